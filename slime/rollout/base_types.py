"""What a rollout function returns, and how one is called."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slime.data.sample import Sample
from slime.errors import DataError
from slime.rollout import loop
from slime.rollout.state import GenerateState

# One execution of a prompt: a sample, or the siblings it fanned out into.
Execution = Sample | list[Sample]
SampleGroup = Sequence[Execution]


@dataclass(frozen=True)
class GroupFates:
    """What became of the groups of a round that are not among its samples, by `group_index`.

    Attributes:
        dropped: by a filter; reason -> groups.
        returned: given back to the data source, or still on their way to a later round.
        taken: (first, after the last) number of the groups that were taken from the data since the
            round before; None where they were taken during this call.
    """

    dropped: dict[str, list[int]]
    returned: list[int]
    taken: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `from_dict`."""
        return {"dropped": self.dropped, "returned": self.returned, "taken": self.taken}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        taken = content.get("taken")
        return cls(content["dropped"], content["returned"], tuple(taken) if taken else None)


@dataclass
class RolloutFnTrainOutput:
    """One round for training.

    Attributes:
        samples: one list per prompt group; in it a Sample, or a list of siblings, per execution.
        metrics: logged as they are.
        fates: of the other groups; None when the function does not tell, so that the ledger cannot
            prove that no prompt was lost.
    """

    samples: Sequence[SampleGroup]
    metrics: dict[str, Any] | None = None
    fates: GroupFates | None = None


@dataclass
class RolloutFnEvalOutput:
    """One evaluation.

    Attributes:
        data: dataset name -> {"rewards": [...], "truncated": [...], "samples": [...]}, one entry
            per sample in each list.
        metrics: logged as they are.
    """

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


def flatten(group: SampleGroup) -> list[Sample]:
    """The samples of a group, fan-outs opened, in order."""
    return [
        sample
        for execution in group
        for sample in (execution if isinstance(execution, list) else [execution])
    ]


def call_rollout_fn(
    fn: Callable[..., Any], args: Any, rollout_id: int, data_source: Any, *, evaluation: bool
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The output of a rollout function; a coroutine is run, a legacy raw list or dict is wrapped.

    An abort that an earlier round ended with is over, also for a function that does not say so.

    Raises:
        DataError: `fn` returned something else.
    """
    GenerateState.start_round_of(args, rollout_id)
    output = fn(args, rollout_id, data_source, evaluation=evaluation)
    if inspect.iscoroutine(output):
        output = loop.run(output)
    expected = RolloutFnEvalOutput if evaluation else RolloutFnTrainOutput
    if isinstance(output, expected):
        return output
    if evaluation and isinstance(output, dict):
        return RolloutFnEvalOutput(data=output)
    if not evaluation and isinstance(output, list):
        return RolloutFnTrainOutput(samples=output)
    raise DataError(
        f"{fn.__module__}.{fn.__qualname__} returned {type(output).__name__} for "
        f"evaluation={evaluation}; it must return a {expected.__name__}"
    )
