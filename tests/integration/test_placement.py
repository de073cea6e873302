"""Who sits on which GPU; Ray is told of four that are not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from slime.config.cluster import ClusterConfig
from slime.errors import ConfigError
from slime.orchestration.placement import Gpu, Placement, make_placement, spread_order
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


def card(node: int, number: int) -> Gpu:
    return Gpu((10, 0, 0, node), number, f"10.0.0.{node} GPU {number}")


def on_cards(*gpus: Gpu) -> Placement:
    """A placement of engines alone."""
    slots = tuple(range(len(gpus)))
    return Placement(None, (), slots, "cuda", gpus)  # pyright: ignore[reportArgumentType]


def test_an_engine_over_two_nodes_has_a_part_on_each() -> None:
    assert sorted((card(10, 0), card(2, 7))) == [card(2, 7), card(10, 0)]  # by number
    placement = on_cards(card(2, 6), card(2, 7), card(10, 0), card(10, 3))
    parts = placement.parts(placement.rollout_slots, 8)
    assert parts == [(0, 1), (2, 3)]
    assert [placement.visible_devices(part) for part in parts] == ["6,7", "0,3"]
    assert placement.parts((2, 3), 8) == [(2, 3)]


def test_an_engine_with_unequal_shares_of_nodes_is_refused_with_their_names() -> None:
    placement = on_cards(card(2, 7), card(10, 0), card(10, 1))
    message = r"2 nodes with 1, 2 GPUs of them: 10\.0\.0\.2 GPU 7, 10\.0\.0\.10 GPU 0"
    with pytest.raises(ConfigError, match=message):
        placement.parts((0, 1, 2), 8)


def test_on_cpus_the_flag_makes_the_nodes() -> None:
    placement = Placement(None, (), tuple(range(4)), "cpu")  # pyright: ignore[reportArgumentType]
    assert placement.parts((0, 1, 2, 3), 2) == [(0, 1), (2, 3)]
    assert placement.parts((2, 3), 8) == [(2, 3)]


@pytest.mark.parametrize(
    ("nodes", "num_train", "expected"),
    [
        ("abab", 2, [0, 1, 2, 3]),  # a rank and an engine on each
        ("aabb", 2, [0, 2, 1, 3]),
        ("baba", 2, [1, 0, 3, 2]),
        ("ababab", 4, [0, 2, 1, 3, 4, 5]),  # ranks of a node are neighbours
        ("aaab", 2, [0, 3, 1, 2]),
        ("aaaa", 2, [0, 1, 2, 3]),  # there is but one node
        ("abcabc", 2, [0, 1, 3, 4, 2, 5]),
        ("aab", 3, [0, 2, 1]),
    ],
)
def test_ranks_on_cpus_lie_on_as_many_nodes_as_the_flag_says(
    nodes: str, num_train: int, expected: list[int]
) -> None:
    order = spread_order(nodes, 2, num_train)
    assert sorted(order) == list(range(len(nodes)))
    assert order == expected


def test_who_sits_where_is_told_of_several_nodes_only() -> None:
    group = None
    there = Placement(group, (0, 1), (2, 3), "cpu", nodes=("10.0.0.1", "10.0.0.2") * 2)  # pyright: ignore[reportArgumentType]
    assert [line.split() for line in there.table(1).splitlines()] == [
        ["10.0.0.1", "train", "rank", "0,", "engine", "0"],
        ["10.0.0.2", "train", "rank", "1,", "engine", "1"],
    ]
    here = Placement(group, (0,), (1,), "cpu", nodes=("10.0.0.1",) * 2)  # pyright: ignore[reportArgumentType]
    assert here.table(1) == ""
