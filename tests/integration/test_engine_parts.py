"""An engine of two nodes: its parts start, die, come back and end together.

Ray, the router and slime's side are real; the servers are processes of a fake without a model. The real
ones: test_train_sglang.py.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.errors import EngineUnavailable
from slime.orchestration.engine_fleet import EngineFleet
from slime.orchestration.placement import make_placement
from slime.orchestration.ray_cluster import connect

pytestmark = pytest.mark.runs

FAKE = Path(__file__).parents[1] / "support" / "fake_sglang_server"
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(FAKE), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.delenv("RAY_ADDRESS", raising=False)
        connect(config_for(tmp_path_factory.mktemp("ray")), num_slots=4)
        yield
        ray.shutdown()


def config_for(folder: Path) -> Config:
    """Two engines, each of two nodes of one slot."""
    flags = {"num_gpus_per_node": "1", "rollout_num_gpus_per_engine": "2", "rollout_num_gpus": "4"}
    flags |= {"device": "cpu", "rollout_engine": "sglang", "debug_rollout_only": ""}
    return load_config(base_argv(folder, **flags, startup_timeout_s=str(TIMEOUT_S)))


@contextmanager
def fleet_of(config: Config, folder: Path) -> Iterator[EngineFleet]:
    placement = make_placement(config, device="cpu", train=False, rollout=True)
    fleet = EngineFleet(config, placement, folder / "logs")
    try:
        yield fleet
    finally:
        fleet.stop()
        ray.util.remove_placement_group(placement.group)


def servers(folder: Path) -> dict[tuple[str, str], int]:
    """Process id of each fake server of this test, by seed of its engine and by its node."""
    found: dict[tuple[str, str], int] = {}
    for process in psutil.process_iter(["cmdline"]):
        words: list[str] = process.info["cmdline"] or []
        if "sglang.launch_server" in words and str(folder / "model") in words:
            seed, node = (words[words.index(f) + 1] for f in ("--random-seed", "--node-rank"))
            found[seed, node] = process.pid
    return found


def test_a_part_that_dies_takes_its_engine_along_and_all_come_back(
    local_ray: None, tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    with fleet_of(config, tmp_path) as fleet:
        fleet.start()
        before, urls = servers(tmp_path), list(fleet.urls)
        assert len(before) == 4
        assert len(urls) == 2
        for number in (0, 1):
            for suffix in ("", "-node-1"):
                assert "of 2 met" in (tmp_path / f"logs/engine-{number}{suffix}.log").read_text()
        seed = str(config.seed + 1)
        os.kill(before[seed, "1"], signal.SIGKILL)
        deadline = time.monotonic() + TIMEOUT_S
        while len(fleet.urls) != 2 or urls[1] in fleet.urls:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        after = servers(tmp_path)
        assert fleet.urls[0] == urls[0]
        assert fleet.take_metrics()["rollout/engine_restarts"] == 1
        is_new = {place: after[place] != before[place] for place in after}
        assert is_new == {place: place[0] == seed for place in before}
    assert servers(tmp_path) == {}


def test_a_part_that_does_not_start_is_told_at_once_with_the_end_of_its_log(
    local_ray: None, tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    (tmp_path / "model" / "fails-on-node-1").touch()
    start = time.monotonic()
    with (
        fleet_of(config, tmp_path) as fleet,
        pytest.raises(EngineUnavailable, match=r"(?s)-node-1 ended with.*the fake part 1 was told"),
    ):
        fleet.start()
    # The first parts wait for the others until their own deadline.
    assert time.monotonic() - start < TIMEOUT_S / 2
    assert servers(tmp_path) == {}
