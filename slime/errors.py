"""The exception tree: every error a user can cause has a class here and a message that says what to do."""

from collections.abc import Iterable


class SlimeError(Exception):
    """Base of all errors slime raises on purpose."""


class ConfigError(SlimeError, ValueError):
    """A flag, or a combination of flags, that cannot work."""


class ConfigErrors(ConfigError):
    """Several of them at once.

    Attributes:
        messages: one per problem.
    """

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__(f"{len(self.messages)} problems:\n{numbered(self.messages)}")


class DataError(SlimeError, ValueError):
    """A row, a template or a mask that does not fit."""


class EngineError(SlimeError, RuntimeError):
    """A rollout engine or the router failed."""


class EngineUnavailable(EngineError):
    """No answer within the deadline: not started, dead, or unreachable."""


class EngineProtocolError(EngineError):
    """An answer that does not follow the engine protocol."""


class RewardError(SlimeError, RuntimeError):
    """A reward function raised, hung, or returned something that is no number."""


class SandboxError(SlimeError, RuntimeError):
    """The sandbox died, or takes no programs."""


class EpisodeError(SlimeError, RuntimeError):
    """An environment raised, or answered something that is no step."""


class WeightSyncError(SlimeError, RuntimeError):
    """An engine's weights differ from the trainer's, or a sync did not finish."""


class CheckpointError(SlimeError, ValueError):
    """A checkpoint that is missing, half-written, or of another model."""


class UnknownParameter(CheckpointError):
    """A parameter name no mapping table knows."""


class ShapeMismatch(CheckpointError):
    """A parameter whose shape differs from the model's."""


class DeadlineExceeded(SlimeError, TimeoutError):
    """A wait outlived its deadline; the message names who waited for whom, and how long."""


def numbered(messages: Iterable[str]) -> str:
    """`  1. first` and so on, one line each; further lines of a message stand under its first."""
    lines: list[str] = []
    for number, message in enumerate(messages, start=1):
        head = f"{number:>3}. "
        lines.append(head + message.replace("\n", "\n" + " " * len(head)))
    return "\n".join(lines)
