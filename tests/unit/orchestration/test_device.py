"""Which device a run takes of what its cluster has."""

import pytest
import ray

from slime.config.cluster import ClusterConfig
from slime.errors import ConfigError
from slime.orchestration.ray_cluster import resolve_device


@pytest.mark.parametrize(
    ("device", "gpus", "trains_only", "expected"),
    [
        ("cpu", 8, False, "cpu"),
        ("cuda", 0, True, "cuda"),  # placement then says that there is no room
        ("auto", 0, False, "cpu"),
        ("auto", 0, True, "cpu"),
        ("auto", 8, True, "cuda"),
    ],
)
def test_auto_takes_cards_for_training_alone(
    device: str, gpus: int, trains_only: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(gpus)})
    cluster = ClusterConfig(device=device)  # pyright: ignore[reportArgumentType]
    assert resolve_device(cluster, trains_only=trains_only) == expected


def test_cards_are_not_left_idle_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    with pytest.raises(ConfigError, match="engines on GPUs are not built yet; give --device cpu"):
        resolve_device(ClusterConfig(), trains_only=False)
