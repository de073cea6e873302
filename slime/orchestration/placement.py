"""Where each process goes: one Ray placement group, a slot per training rank and per engine device."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import batched, groupby
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.config.cluster import ClusterConfig
from slime.config.config import Config
from slime.config.layout import count_slots
from slime.errors import ConfigError, DeadlineExceeded
from slime.orchestration.ray_cluster import CPU_PER_SLOT
from slime.orchestration.waiting import wait_for


@dataclass(frozen=True, order=True)
class Gpu:
    """One card of the cluster; sorts by node address, then by number.

    Attributes:
        node: address of its node, as numbers where it has some.
        number: as CUDA_VISIBLE_DEVICES of that node's processes names it.
    """

    node: tuple[int, ...] | tuple[str]
    number: int
    name: str = field(compare=False)


@dataclass(frozen=True)
class Placement:
    """Slots of one run.

    Attributes:
        group: the placement group; one bundle per slot.
        train_slots: bundle of each training rank.
        rollout_slots: bundle of each engine device; the same bundles as the trainers' under
            `--colocate`.
        device: `cuda` or `cpu`.
        gpus: the card of each bundle; empty on CPU.
        nodes: address of the node of each bundle.
    """

    group: PlacementGroup
    train_slots: tuple[int, ...]
    rollout_slots: tuple[int, ...]
    device: Literal["cpu", "cuda"]
    gpus: tuple[Gpu, ...] = ()
    nodes: tuple[str, ...] = ()

    def parts(self, slots: Sequence[int], slots_per_node: int) -> list[tuple[int, ...]]:
        """The slots of one engine, those of each node for themselves.

        Args:
            slots: neighbours are on one node.
            slots_per_node: on a CPU this makes the nodes.

        Raises:
            ConfigError: the nodes have unequal shares, which SGLang does not know.
        """
        if self.device == "cpu":
            return list(batched(slots, slots_per_node))
        parts = [tuple(part) for _, part in groupby(slots, lambda slot: self.gpus[slot].node)]
        if len({len(part) for part in parts}) > 1:
            raise ConfigError(
                f"an engine of --rollout-num-gpus-per-engine {len(slots)} would lie on "
                f"{len(parts)} nodes with {', '.join(str(len(part)) for part in parts)} GPUs of them: "
                f"{', '.join(self.gpus[slot].name for slot in slots)}. SGLang wants as many on each: "
                "let engines divide a node or take whole ones, and training fill whole nodes."
            )
        return parts

    def visible_devices(self, slots: Sequence[int]) -> str | None:
        """CUDA_VISIBLE_DEVICES for one process on several slots of a node; None on CPU."""
        if self.device == "cpu":
            return None
        return ",".join(str(self.gpus[slot].number) for slot in slots)

    def table(self, engine_size: int) -> str:
        """Who sits on which card, a line each; on CPUs on which node, if there are several."""
        places = [gpu.name for gpu in self.gpus] or self.nodes
        if len(set(places)) < 2 and self.device == "cpu":
            return ""
        users: dict[str, list[str]] = {}
        for rank, slot in enumerate(self.train_slots):
            users.setdefault(places[slot], []).append(f"train rank {rank}")
        for place, slot in enumerate(self.rollout_slots):
            users.setdefault(places[slot], []).append(f"engine {place // engine_size}")
        return "\n".join(f"  {place:<24} {', '.join(names)}" for place, names in users.items())

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


def make_placement(
    cluster: ClusterConfig, *, device: Literal["cpu", "cuda"], train: bool, rollout: bool
) -> Placement:
    """Reserve the slots.

    Raises:
        DeadlineExceeded: the cluster has no room within `--startup-timeout-s`; says what was asked
            and what is there.
    """
    slots = count_slots(cluster, trains=train, rolls=rollout)
    num_train, num_rollout, num_bundles = slots.train, slots.rollout, slots.total
    bundle = {"CPU": CPU_PER_SLOT} if device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    # Slots on CPUs ask for so little that the first node would get them all.
    spreads = device == "cpu" and cluster.actor_num_nodes > 1
    group = placement_group(
        [bundle] * max(1, num_bundles), strategy="SPREAD" if spreads else "PACK"
    )
    if not group.wait(cluster.startup_timeout_s):
        raise DeadlineExceeded(
            f"the Ray cluster had no room for {num_bundles} slots of {bundle} (training {num_train}, rollout "
            f"{num_rollout}{', shared' if cluster.colocate else ''}) within {cluster.startup_timeout_s:.0f} s; "
            f"free now: "
            f"{ray.available_resources()}. Lower --actor-num-gpus-per-node or --rollout-num-gpus, or add nodes."
        )
    gpus = _gpus_of(group, cluster.startup_timeout_s) if device == "cuda" else ()
    nodes = _nodes_of(group)
    # Neighbours in the order of ranks are neighbours in the machine: Ray fills bundles as they come.
    order = sorted(range(len(gpus)), key=lambda slot: gpus[slot]) or range(num_bundles)
    if spreads and train:
        order = spread_order(nodes[:num_bundles], cluster.actor_num_nodes, num_train)
    first = 0 if cluster.colocate else num_train
    return Placement(
        group,
        tuple(order[:num_train]),
        tuple(order[first : first + num_rollout]),
        device,
        gpus,
        nodes,
    )


def spread_order(nodes: Sequence[str], num_nodes: int, num_train: int) -> list[int]:
    """Bundles in the order of slots, where training is to lie on `num_nodes` nodes.

    The first `num_train` are equal shares of as many nodes, if these have that many bundles; those of a
    node stand together, before and after, and nodes in the order of their addresses.

    Args:
        nodes: of each bundle.
    """
    by_node = [
        [bundle for bundle, its in enumerate(nodes) if its == node]
        for node in sorted(set(nodes), key=_sortable)
    ]
    share = num_train // num_nodes
    train = [b for bundles in by_node if len(bundles) >= share for b in bundles[:share]]
    rest = [b for bundles in by_node for b in bundles if b not in train[:num_train]]
    return [*train[:num_train], *rest]


def _nodes_of(group: PlacementGroup) -> tuple[str, ...]:
    """Address of the node of each bundle."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    table: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return tuple(addresses[table[index]] for index in range(group.bundle_count))


def _gpus_of(group: PlacementGroup, timeout_s: float) -> tuple[Gpu, ...]:
    """The card of each bundle, asked from a task on it."""
    where: Any = ray.remote(_where)
    calls = {
        f"slot {index}": where.options(
            num_cpus=0,
            num_gpus=1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            ),
        ).remote()
        for index in range(group.bundle_count)
    }
    found: list[tuple[str, int]] = wait_for(
        calls, action="say which GPU it is", timeout_s=timeout_s
    )
    return tuple(Gpu(_sortable(node), number, f"{node} GPU {number}") for node, number in found)


def _where() -> tuple[str, int]:
    """Address of this node, and the card that this task was given."""
    return ray.util.get_node_ip_address(), int(ray.get_gpu_ids()[0])


def _sortable(node: str) -> tuple[int, ...] | tuple[str]:
    try:
        return tuple(ipaddress.ip_address(node).packed)
    except ValueError:  # a name
        return (node,)
