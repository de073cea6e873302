"""Where each process goes: one Ray placement group, a slot per training rank and per engine device."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.config.cluster import ClusterConfig
from slime.config.config import Config
from slime.config.layout import count_slots
from slime.errors import DeadlineExceeded
from slime.orchestration.ray_cluster import CPU_PER_SLOT


@dataclass(frozen=True)
class Placement:
    """Slots of one run.

    Attributes:
        group: the placement group; one bundle per slot.
        train_slots: bundle of each training rank.
        rollout_slots: bundle of each engine device; the same bundles as the trainers' under
            `--colocate`.
        device: `cuda` or `cpu`.
    """

    group: PlacementGroup
    train_slots: tuple[int, ...]
    rollout_slots: tuple[int, ...]
    device: str

    def options(self, slot: int) -> dict[str, Any]:
        """Ray actor options that put an actor on a slot; colocated actors share its GPU."""
        shared = bool(set(self.train_slots) & set(self.rollout_slots))
        share = 0.4 if shared else 1.0
        resources = {"num_gpus": share} if self.device == "cuda" else {}
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=slot)
        return {"num_cpus": CPU_PER_SLOT * share, "scheduling_strategy": strategy, **resources}


def engine_kind(config: Config) -> str:
    """`--rollout-engine`, or what suits the device: sglang on CUDA, embedded on CPU."""
    if config.rollout_engine != "auto":
        return config.rollout_engine
    return "sglang" if config.device == "cuda" else "embedded"


def make_placement(cluster: ClusterConfig, *, device: str, train: bool, rollout: bool) -> Placement:
    """Reserve the slots.

    Raises:
        DeadlineExceeded: the cluster has no room within `--startup-timeout-s`; says what was asked
            and what is there.
    """
    slots = count_slots(cluster, trains=train, rolls=rollout)
    num_train, num_rollout, num_bundles = slots.train, slots.rollout, slots.total
    bundle = {"CPU": CPU_PER_SLOT} if device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    group = placement_group([bundle] * max(1, num_bundles), strategy="PACK")
    if not group.wait(cluster.startup_timeout_s):
        raise DeadlineExceeded(
            f"the Ray cluster had no room for {num_bundles} slots of {bundle} (training {num_train}, rollout "
            f"{num_rollout}{', shared' if cluster.colocate else ''}) within {cluster.startup_timeout_s:.0f} s; "
            f"free now: "
            f"{ray.available_resources()}. Lower --actor-num-gpus-per-node or --rollout-num-gpus, or add nodes."
        )
    first = 0 if cluster.colocate else num_train
    return Placement(
        group, tuple(range(num_train)), tuple(range(first, first + num_rollout)), device
    )
