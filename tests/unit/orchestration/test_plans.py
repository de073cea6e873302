import pytest

from slime.config.cluster import ClusterConfig
from slime.config.layout import Slots, count_slots, is_due
from slime.data.sample import Sample
from slime.errors import DataError
from slime.orchestration.rollout_manager import flatten_samples


def test_separate_sides_have_separate_slots():
    cluster = ClusterConfig(actor_num_nodes=2, actor_num_gpus_per_node=4, rollout_num_gpus=3)
    assert count_slots(cluster, trains=True, rolls=True) == Slots(8, 3, 11)
    assert count_slots(cluster, trains=True, rolls=False) == Slots(8, 0, 8)


def test_colocated_sides_share_slots():
    cluster = ClusterConfig(actor_num_gpus_per_node=4, rollout_num_gpus=4, colocate=True)
    assert count_slots(cluster, trains=True, rolls=True) == Slots(4, 4, 4)


@pytest.mark.parametrize(
    ("rollout_id", "interval", "per_epoch", "due"),
    [
        (0, 2, None, False),
        (1, 2, None, True),
        (9, 7, None, True),
        (9, None, None, False),
        (4, 3, 5, True),
    ],
)
def test_periodic_actions_follow_interval_epoch_and_last_round(
    rollout_id, interval, per_epoch, due
):
    assert is_due(rollout_id, interval, per_epoch, num_rollout=10) is due


def test_fan_outs_are_flattened_in_order():
    a, b, c = Sample(index=0), Sample(index=1), Sample(index=2)
    assert flatten_samples([[a, [b, c]]]) == [a, b, c]


def test_a_rollout_of_something_else_is_refused():
    with pytest.raises(DataError, match="returned dict"):
        flatten_samples([[{}]])
