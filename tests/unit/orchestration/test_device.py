"""What a run takes of its cluster: a device; and of the job it is, the environment."""

import pytest
import ray

from slime.config.cluster import ClusterConfig
from slime.orchestration.ray_cluster import job_variables, resolve_device


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 8, "cpu"),
        ("cuda", 0, "cuda"),  # placement then says that there is no room
        ("auto", 0, "cpu"),
        ("auto", 8, "cuda"),
    ],
)
def test_auto_takes_cards_where_there_are_some(
    device: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(gpus)})
    cluster = ClusterConfig(device=device)  # pyright: ignore[reportArgumentType]
    assert resolve_device(cluster) == expected


def test_variables_of_a_job_are_known_by_name() -> None:
    assert job_variables('{"runtime_env": {"env_vars": {"A": "1", "B": "2"}}}') == {"A", "B"}
    assert job_variables('{"runtime_env": {"working_dir": "."}}') == set()
    assert job_variables('{"runtime_env": null, "metadata": {}}') == set()
