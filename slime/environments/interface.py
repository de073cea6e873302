"""What an environment is: text out, text in, a reward for each step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, cast

from slime.data.chat import Message, as_messages
from slime.errors import DataError, EpisodeError

# Text, which is told as one message of the user; or messages, which are told as they are.
Observation = str | list[Message]

# In Step.info: the model's text was no action.
INVALID_ACTION = "invalid_action"


@dataclass(frozen=True)
class Step:
    """What an environment answers to one turn.

    Attributes:
        observation: told to the model unless the episode is over.
        reward: of this step; those of an episode are summed. None in all steps leaves it to the reward function.
        terminated: the episode came to its end.
        truncated: it was cut short, by a limit of the environment's own.
        info: numbers, texts and booleans of the last step are kept in the sample's metadata; `invalid_action` true
            is counted.
    """

    observation: Observation
    reward: float | None = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Environment(Protocol):
    """One episode. Methods may be `async def`; plain ones run in a thread that only this episode uses.

    What they raise fails the sample, counted as `error_cat/environment`, and not the round.
    """

    def reset(self, seed: int) -> Observation:
        """Begin; the same seed begins the same episode.

        Args:
            seed: in [0, 2**31), the same for all samples of a group.
        """
        ...

    def step(self, text: str) -> Step:
        """One turn.

        Args:
            text: of the model, without the token that ends its turn.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; called once, whatever happened."""
        ...


def checked_observation(value: Any) -> Observation:
    """`value`, if it is an observation.

    Raises:
        EpisodeError: it is not.
    """
    if isinstance(value, str):
        return value
    try:
        return as_messages(value, where="observation")
    except DataError as error:
        raise EpisodeError(
            f"an observation is text or a list of messages, found {value!r:.80}"
        ) from error


def checked_step(value: Any) -> Step:
    """`value`, if it is a step, with plain Python's float and bools.

    Raises:
        EpisodeError: it is not.
    """
    if not isinstance(value, Step):
        raise EpisodeError(f"step() returns a slime.environments.Step, found {value!r:.80}")
    reward = cast(Any, value.reward)
    if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
        raise EpisodeError(f"a reward is a finite number or None, found {reward!r:.80}")
    return Step(
        checked_observation(value.observation),
        None if reward is None else float(reward),
        bool(value.terminated),
        bool(value.truncated),
        value.info,
    )
