"""The books of a stream: every group that was begun, until it is in a round or dropped."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slime.data.data_source import DataSource
from slime.data.sample import Sample
from slime.observability.metrics import spread
from slime.rollout.admission import Bound
from slime.rollout.base_types import Execution, GroupFates, flatten
from slime.rollout.filter_hub.base_types import drop_metrics
from slime.rollout.groups import snapshot
from slime.rollout.sglang_rollout import group_index
from slime.rollout.unfinished import Unfinished, frozen_sample, oldest_weights, renewed

Group = list[Execution]


@dataclass(frozen=True)
class Running:
    """A group on its way: its samples, as they were when it was begun, and the weights then."""

    group: list[Sample]
    before: list[Sample]
    weights: int


@dataclass(frozen=True)
class Whole:
    """A finished group, as it was when it was begun, and the weights of its oldest token."""

    group: Group
    before: list[Sample]
    weights: int


class Books:
    """Where each group is.

    Args:
        bound: what its age is held to.

    Attributes:
        weights: of the engines, see `admission.py`.
        next_round: the first one that was not handed out.
        again: groups that go on, and the weights they were begun with; before any new ones.
        running: by the task that answers them.
        whole: those that wait for a round, in the order in which they became whole.
        reserve: those the filter dropped but would take if groups lack, with the reason.
        drops: numbers of the groups dropped since the last round, by reason.
        num_renewed: groups since then that were too old to be trained, and begun anew.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.weights = 0
        self.next_round = 0
        self.again: deque[tuple[list[Sample], int]] = deque()
        self.running: dict[Any, Running] = {}
        self.whole: list[Whole] = []
        self.reserve: list[tuple[Whole, str]] = []
        self.drops: defaultdict[str, list[int]] = defaultdict(list)
        self.num_renewed = 0
        self._taken_before: int | None = None

    def open(self, data_source: DataSource) -> None:
        """Groups are taken from `data_source` from now on."""
        self._taken_before = _number(data_source)

    def restore(self, groups: Sequence[Unfinished]) -> None:
        """Begin with these."""
        for item in groups:
            if item.is_whole:
                self.whole.append(Whole(list(item.group), item.before, item.weights))
            else:
                self.again.append((item.for_data_source(), item.weights))

    def outstanding(self) -> int:
        """Groups that were begun and are in no round as yet."""
        return sum(map(len, (self.running, self.again, self.whole, self.reserve)))

    def room(self) -> int:
        """New groups that may be begun now."""
        return self.bound.room(
            weights=self.weights, next_round=self.next_round, outstanding=self.outstanding()
        )

    def is_full(self, rollout_id: int) -> bool:
        """Whether this round can be handed out."""
        unfinished = [item.weights for item in self.running.values()]
        unfinished += [weights for _, weights in self.again]
        return self.bound.is_full(len(self.whole), unfinished, rollout_id)

    def young(self, group: list[Sample], weights: int) -> tuple[list[Sample], int]:
        """The group and its weights; its prompts and today's weights if it is too old to be trained.

        That needs a checkpoint of a run with other flags.
        """
        if not self.bound.is_too_old(weights, self.next_round):
            return group, weights
        self.num_renewed += 1
        return [renewed(sample) for sample in group], self.weights

    def renew_old(self) -> None:
        """Let groups that are too old for the next round be begun anew."""
        self.again = deque(self.young(group, weights) for group, weights in self.again)
        is_old = [self.bound.is_too_old(item.weights, self.next_round) for item in self.whole]
        for item, old in zip(self.whole, is_old, strict=True):
            if old:
                self.again.append(self.young(item.before, item.weights))
        self.whole = [item for item, old in zip(self.whole, is_old, strict=True) if not old]

    def drop(self, group: Group, reason: str) -> None:
        """A filter does not want it."""
        self.drops[reason].append(group_index(flatten(group)))

    def use_reserve(self) -> None:
        """Take reserved groups where nothing is on its way that could fill the round."""
        while self.reserve and len(self.whole) + len(self.running) < self.bound.batch:
            self.whole.append(self.reserve.pop(0)[0])

    def take_round(self, rollout_id: int) -> list[Whole]:
        """The groups of a round, out of the books; what is in reserve is dropped."""
        places = set(self.bound.choose([item.weights for item in self.whole]))
        chosen = [item for i, item in enumerate(self.whole) if i in places]
        self.whole = [item for i, item in enumerate(self.whole) if i not in places]
        for item, reason in self.reserve:
            self.drop(item.group, reason)
        self.reserve.clear()
        self.next_round = rollout_id + 1
        return chosen

    def metrics(self, rollout_id: int, chosen: Sequence[Whole]) -> dict[str, Any]:
        """Of a round that was just taken, and of what stays."""
        ages = [
            rollout_id - oldest_weights([sample], item.weights)
            for item in chosen
            for sample in flatten(item.group)
        ]
        return {
            **drop_metrics({reason: len(groups) for reason, groups in self.drops.items()}),
            **spread("rollout/staleness", ages),
            **{f"rollout/staleness/{age}": ages.count(age) / len(ages) for age in sorted({*ages})},
            "rollout/in_flight_groups": len(self.running) + len(self.again),
            "rollout/whole_groups": len(self.whole),
            "rollout/renewed_groups": self.num_renewed,
        }

    def take_fates(self, data_source: DataSource) -> GroupFates:
        """Of the groups that are not in the round that was just taken; a new account begins."""
        groups = [item.group for item in self.running.values()]
        groups += [group for group, _ in self.again]
        groups += [flatten(item.group) for item in self.whole]
        first, last = self._taken_before, _number(data_source)
        taken = None if first is None or last is None else (first, last)
        fates = GroupFates(dict(self.drops), [group_index(group) for group in groups], taken)
        self._taken_before, self.num_renewed = last, 0
        self.drops.clear()
        return fates

    def frozen(
        self, is_plain: Callable[[Sequence[Sample]], bool], *, group_rm: bool
    ) -> list[Unfinished]:
        """Everything that was begun and is in no round, as it is now.

        Args:
            is_plain, group_rm: see `frozen_sample`.
        """
        frozen = [
            Unfinished([snapshot(sample) for sample in group], group, weights)
            for group, weights in self.again
        ]
        for item in self.running.values():
            plain = is_plain(item.group)
            group = [
                frozen_sample(sample, before, is_plain=plain, group_rm=group_rm)
                for sample, before in zip(item.group, item.before, strict=True)
            ]
            frozen.append(Unfinished(group, item.before, item.weights))
        for item in self.whole:
            group = [
                snapshot(part) if isinstance(part, Sample) else [snapshot(one) for one in part]
                for part in item.group
            ]
            frozen.append(Unfinished(group, item.before, item.weights, is_whole=True))
        return frozen


def _number(data_source: DataSource) -> int | None:
    """Number of the next group that the data source takes from its data; None if it has none."""
    return getattr(data_source, "sample_group_index", None)
