"""What rewards share: their types, their label, and the error that names its category."""

from collections.abc import Awaitable, Callable
from typing import Any

from slime.data.sample import Sample
from slime.errors import ConfigError, RewardError

Reward = float | dict[str, Any]
RewardFunction = Callable[[Any, Sample], Awaitable[Reward]]


class BadReward(RewardError):
    """A reward that is none. `reason` is one word for metrics: "not_a_number", "missing_label"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def label_of(args: Any, sample: Sample) -> Any:
    """The label of a sample.

    Raises:
        ConfigError: there is none, because --label-key is not set.
        BadReward: there is none in this row.
    """
    if sample.label is not None:
        return sample.label
    if args.label_key is None:
        raise ConfigError("this reward compares with a label; name its column with --label-key")
    raise BadReward("missing_label", f"sample {sample.index} has no label")
