"""Who sits on which GPU; Ray is told of four that are not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from slime.config.cluster import ClusterConfig
from slime.errors import ConfigError
from slime.orchestration.placement import Gpu, Placement, make_placement
from slime.orchestration.ray_cluster import connect


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 8, "GPU": 4}')
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        connect(ClusterConfig(device="auto"), num_slots=4)
        yield
        ray.shutdown()


@contextmanager
def placed(cluster: ClusterConfig) -> Iterator[Placement]:
    placement = make_placement(cluster, device="cuda", train=True, rollout=True)
    try:
        yield placement
    finally:
        ray.util.remove_placement_group(placement.group)


def numbers(placement: Placement, slots: tuple[int, ...]) -> list[int]:
    return [placement.gpus[slot].number for slot in slots]


def test_ranks_and_engines_follow_the_numbers_of_the_cards(four_gpus: None) -> None:
    cluster = ClusterConfig(
        device="cuda",
        actor_num_gpus_per_node=2,
        rollout_num_gpus=2,
        rollout_num_gpus_per_engine=2,
        startup_timeout_s=60.0,
    )
    with placed(cluster) as placement:
        assert numbers(placement, placement.train_slots) == [0, 1]
        assert numbers(placement, placement.rollout_slots) == [2, 3]
        assert placement.visible_devices(placement.rollout_slots) == "2,3"
        lines = [line.split() for line in placement.table(2).splitlines()]
    node = ray.util.get_node_ip_address()
    assert [line[:3] for line in lines] == [[node, "GPU", str(i)] for i in range(4)]
    assert [" ".join(line[3:]) for line in lines] == [
        "train rank 0", "train rank 1", "engine 0", "engine 0",
    ]  # fmt: skip


def test_colocated_engines_have_the_cards_of_the_ranks_with_their_numbers(four_gpus: None) -> None:
    cluster = ClusterConfig(
        device="cuda",
        actor_num_gpus_per_node=4,
        rollout_num_gpus=4,
        rollout_num_gpus_per_engine=2,
        colocate=True,
        startup_timeout_s=60.0,
    )
    with placed(cluster) as placement:
        assert placement.train_slots == placement.rollout_slots
        assert numbers(placement, placement.train_slots) == [0, 1, 2, 3]
        assert "train rank 3, engine 1" in placement.table(2).splitlines()[3]


def test_an_engine_over_two_nodes_is_refused_with_their_names() -> None:
    gpus = (Gpu((10, 0, 0, 2), 7, "10.0.0.2 GPU 7"), Gpu((10, 0, 0, 10), 0, "10.0.0.10 GPU 0"))
    assert sorted((gpus[1], gpus[0])) == list(gpus)  # 2 before 10
    placement = Placement(None, (), (0, 1), "cuda", gpus)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2 GPU 7, 10\.0\.0\.10 GPU 0"):
        placement.visible_devices((0, 1))
