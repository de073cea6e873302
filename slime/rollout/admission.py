"""How many groups may be begun, and what a round must wait for, so that no sample grows too old. Pure.

`weights` counts the rounds trained into the weights that wrote a group's first token; an engine's
weight version is that plus one. Trained in round r, such a group is r - `weights` rounds old.

A group has a last round that may train it. Groups are begun as long as all that were begun fit into
the rounds up to the last one of the youngest; and a round is handed out only when what stays unfinished
fits into the rounds that may still train it. It waits otherwise, and nothing is ever thrown away.

Source: the bound on the number of groups is that of AReaL, arXiv:2505.24298, eq. 3. Alone it does not
hold for a group that others overtake, hence the second one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """What a group's age is held to.

    Attributes:
        batch: groups of a round.
        max_staleness: most rounds trained since the weights of a group's first token.
        num_rollout: rounds of the run; no group is begun for a later one.
    """

    batch: int
    max_staleness: int
    num_rollout: int

    def room(self, *, weights: int, next_round: int, outstanding: int) -> int:
        """Groups that may be begun now.

        Args:
            weights: of the engines.
            next_round: the first round that was not handed out.
            outstanding: groups that were begun and are in no round as yet, whole ones included.
        """
        rounds = min(weights + self.max_staleness + 1, self.num_rollout) - next_round
        return max(0, rounds * self.batch - outstanding)

    def is_too_old(self, weights: int, in_round: int) -> bool:
        """Whether a group must not be trained in this round any more."""
        return in_round - weights > self.max_staleness

    def is_full(self, whole: int, unfinished: Iterable[int], in_round: int) -> bool:
        """Whether a round can be handed out.

        Args:
            whole: number of groups that are.
            unfinished: weights of the others.
        """
        if whole < self.batch:
            return False
        last_rounds = sorted(weights + self.max_staleness for weights in unfinished)
        return all(
            count <= (last - in_round) * self.batch
            for count, last in enumerate(last_rounds, start=1)
        )

    def choose(self, whole: Sequence[int]) -> list[int]:
        """Places of the groups that make a round: the oldest, of those as old the first to be whole.

        Args:
            whole: their weights, in the order in which they became whole.
        """
        order = sorted(range(len(whole)), key=lambda i: (whole[i], i))
        return sorted(order[: self.batch])
