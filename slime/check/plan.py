"""Plan: what a run will do, in numbers; and whether a cluster has room for it."""

from dataclasses import dataclass

from slime.check.data import DataFacts
from slime.config.config import Config
from slime.config.layout import Slots, count_slots, data_parallel_size, is_due
from slime.config.problems import Problems


@dataclass(frozen=True)
class Cluster:
    """Machines that a run is meant for and that need not be here."""

    nodes: int
    gpus_per_node: int


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        slots: who sits where.
        data_parallel: training ranks that see different samples; 0 when nothing trains.
        first_round, num_rounds: rounds are numbered `first_round` to `num_rounds` - 1; None when
            the number follows from data that was not read.
        rounds_per_epoch: None without a data set.
        samples_per_round, steps_per_round: in a round.
        saves: rounds after which a checkpoint is written.
        evaluations: how often the evaluation data is answered, the one before training included.
    """

    slots: Slots
    data_parallel: int
    first_round: int
    num_rounds: int | None
    rounds_per_epoch: int | None
    samples_per_round: int
    steps_per_round: int
    saves: tuple[int, ...]
    evaluations: int

    @property
    def rounds_left(self) -> int | None:
        """Rounds that this start will do; None when their number is not known."""
        return None if self.num_rounds is None else max(self.num_rounds - self.first_round, 0)


def slots_of(config: Config) -> Slots:
    """The slots a run with this configuration reserves."""
    return count_slots(
        config, trains=not config.debug_rollout_only, rolls=not config.debug_train_only
    )


def make_plan(config: Config, prompts: DataFacts | None, first_round: int) -> Plan:
    """The numbers of a run whose flags are right."""
    per_epoch = None
    if prompts is not None:
        per_epoch = prompts.num_kept // (config.rollout_batch_size or 1)
    num_rounds = config.num_rollout
    if num_rounds is None and per_epoch is not None:
        num_rounds = per_epoch * (config.num_epoch or 1)
    samples = (config.rollout_batch_size or 0) * config.n_samples_per_prompt
    rounds = range(first_round, num_rounds or 0)
    saves: tuple[int, ...] = ()
    if config.save is not None and not config.debug_rollout_only:
        last = (num_rounds or 0) - 1
        saves = tuple(
            number
            for number in rounds
            if number == last or is_due(number, config.save_interval, per_epoch, num_rounds)
        )
    evaluates = config.eval_interval is not None and not config.debug_train_only
    due = [n for n in rounds if is_due(n, config.eval_interval, per_epoch, num_rounds)]
    begins = evaluates and first_round == 0 and not config.skip_eval_before_train
    return Plan(
        slots=slots_of(config),
        data_parallel=0 if config.debug_rollout_only else data_parallel_size(config),
        first_round=first_round,
        num_rounds=num_rounds,
        rounds_per_epoch=per_epoch,
        samples_per_round=samples,
        steps_per_round=samples // (config.global_batch_size or samples or 1),
        saves=saves,
        evaluations=(len(due) if evaluates else 0) + begins,
    )


def check_epochs(config: Config, prompts: DataFacts | None, problems: Problems) -> None:
    """Note a data set that is too small to fill a round, where the rounds are counted in epochs."""
    view = problems.readable(config)
    with problems.caught():
        size = view.rollout_batch_size or 0
        if prompts is None or view.num_rollout is not None or view.num_epoch is None:
            return
        if prompts.num_kept < size:
            problems.add(
                f"--num-epoch {view.num_epoch} needs a data set of at least --rollout-batch-size "
                f"{size} prompts; {prompts.path} has {prompts.num_kept}: lower the batch size, or "
                "give --num-rollout"
            )


def check_cluster(config: Config, cluster: Cluster, problems: Problems) -> None:
    """Note what the cluster has no room for."""
    view = problems.readable(config)
    with problems.caught():
        slots, there = slots_of(view), cluster.nodes * cluster.gpus_per_node
        if slots.total > there:
            shared = ", shared" if view.colocate else ""
            problems.add(
                f"the run needs {slots.total} device slots (training {slots.train}, rollout "
                f"{slots.rollout}{shared}), and {cluster.nodes} nodes x {cluster.gpus_per_node} = "
                f"{there} are there; lower --actor-num-gpus-per-node or --rollout-num-gpus, or add "
                "nodes"
            )
    with problems.caught():
        per_node = view.actor_num_gpus_per_node
        if not view.debug_rollout_only and per_node > cluster.gpus_per_node:
            problems.add(
                f"--actor-num-gpus-per-node {per_node} is more than the {cluster.gpus_per_node} of "
                "a node; spread them over more --actor-num-nodes"
            )
    with problems.caught():
        if not view.debug_rollout_only and view.actor_num_nodes > cluster.nodes:
            problems.add(
                f"--actor-num-nodes {view.actor_num_nodes} is more than the {cluster.nodes} nodes "
                "that are there; lower it, or add nodes"
            )
    with problems.caught():
        size = view.rollout_num_gpus_per_engine
        if size > cluster.gpus_per_node and size % cluster.gpus_per_node:
            if cluster.gpus_per_node != view.num_gpus_per_node:  # else a rule says so
                problems.add(
                    f"--rollout-num-gpus-per-engine {size} is neither within a node of "
                    f"{cluster.gpus_per_node} slots nor a number of whole nodes; change it"
                )
        elif view.device != "cpu" and (start := _first_torn_engine(view, cluster)) is not None:
            first = "shared with training" if view.colocate else "behind those that train"
            problems.add(
                f"--rollout-num-gpus-per-engine {size}: the slots of engines ({first}) are dealt in "
                f"order, so the engine from slot {start} on would begin within one node of "
                f"{cluster.gpus_per_node} and end in another; let engines divide a node, and "
                "training slots fill whole ones"
            )


def _first_torn_engine(config: Config, cluster: Cluster) -> int | None:
    """First slot of an engine that neither lies in one node nor takes whole ones."""
    slots, size = slots_of(config), config.rollout_num_gpus_per_engine
    begin = 0 if config.colocate else slots.train
    for start in range(begin, begin + slots.rollout, size):
        offset = start % cluster.gpus_per_node
        if offset and offset + size > cluster.gpus_per_node:
            return start
    return None
