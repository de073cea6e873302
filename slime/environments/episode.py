"""Episode: one environment through the turns of one sample, and what is kept of it in the sample's metadata."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, cast

import numpy as np

from slime.data.sample import Sample
from slime.environments.calls import Caller
from slime.environments.interface import (
    INVALID_ACTION,
    Environment,
    Observation,
    Step,
    checked_observation,
    checked_step,
)
from slime.errors import ConfigError, DataError, EpisodeError
from slime.plugins import load_function
from slime.rollout.seeds import sampling_seed
from slime.rollout.turns import within_deadline

logger = logging.getLogger(__name__)

# In Sample.metadata: of the row, and of the episode.
SEED, SETTINGS, EPISODE = "seed", "environment_args", "episode"
CLOSE_TIMEOUT_S = 10.0
_PLAIN = (str, bool, int, float, type(None))
_warned: set[str] = set()


@dataclass(frozen=True)
class Record:
    """What has happened in an episode; `metadata["episode"]` is this as a dict.

    Attributes:
        seed: it began with.
        observation: the first one.
        actions: texts of the model that the environment answered.
        rewards: one for each of them.
        invalid_actions: how many of them were none.
        terminated, truncated: of the last step.
        info: plain values of the last step's info.
        seen: digest of all observations.
        restarts: how often it was begun anew, as it could not be repeated.
    """

    seed: int
    observation: Observation = ""
    actions: list[str] = field(default_factory=list[str])
    rewards: list[float | None] = field(default_factory=list[float | None])
    invalid_actions: int = 0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: str = ""
    restarts: int = 0

    def begun(self, observation: Observation) -> "Record":
        """With the first observation, and nothing after it."""
        return Record(self.seed, observation, seen=_digest("", observation), restarts=self.restarts)

    def after(self, text: str, step: Step) -> "Record":
        """With one step more; shares no list with this one."""
        return Record(
            seed=self.seed,
            observation=self.observation,
            actions=[*self.actions, text],
            rewards=[*self.rewards, step.reward],
            invalid_actions=self.invalid_actions + bool(step.info.get(INVALID_ACTION)),
            terminated=step.terminated,
            truncated=step.truncated,
            info=_plain(step.info),
            seen=_digest(self.seen, step.observation),
            restarts=self.restarts,
        )

    def total(self) -> float | None:
        """The reward of the episode: the sum, 0.0 before the first step; None if no step had one."""
        given = [reward for reward in self.rewards if reward is not None]
        return sum(given) if given or not self.rewards else None


class Episode:
    """The environment of one sample.

    Args:
        args: flat namespace; read are environment_path, environment_args, environment_timeout_s, rollout_seed.
        evaluation: another stream of seeds.

    Attributes:
        name: of the environment in errors and waits.
        record: so far; `begin` and `step` write it into the sample's metadata.

    Raises:
        ConfigError: no environment is named.
        DataError: the row's settings are no object, or its seed no number.
    """

    def __init__(self, args: Any, sample: Sample, *, evaluation: bool) -> None:
        path: str | None = args.environment_path
        if path is None:
            raise ConfigError(
                "slime.environments.generate.generate needs --environment-path, the environment"
            )
        self._sample = sample
        self._timeout_s: float = args.environment_timeout_s
        self._make = load_function(path)
        self._settings = dict(args.environment_args) | _row_settings(sample)
        self._environment: Environment | None = None
        kind = self._settings.get("id")
        self.name = f"environment {path}" + (f" ({kind})" if isinstance(kind, str) else "")
        self._caller = Caller(self.name)
        known = cast(dict[str, Any] | None, sample.metadata.get(EPISODE))
        if known is not None and sample.response_length:
            self.record = Record(**known)
        else:
            self.record = Record(_seed(args, sample, evaluation))

    async def begin(self) -> Observation:
        """Make the environment; its first observation.

        Raises:
            EpisodeError: it raised. DeadlineExceeded: it took longer than --environment-timeout-s.
        """
        self._environment = await self._within("be made", self._make, self._settings)
        observation = await self._reset()
        self._keep(self.record.begun(observation))
        return observation

    async def repeat(self) -> bool:
        """Bring a new environment to where `record` ends; whether it came there.

        Raises: as `begin`.
        """
        wanted = self.record
        await self.begin()
        for text in wanted.actions:
            if self.record.terminated or self.record.truncated:
                break
            await within_deadline(self.step(text), self._timeout_s, self._call_name("step"))
        if self.record == wanted:
            return True
        if self.name not in _warned:
            _warned.add(self.name)
            logger.warning(
                "%s does not repeat an episode from its seed and actions: samples that go on in a "
                "later round begin theirs anew",
                self.name,
            )
        await self.close()
        self._caller = Caller(self.name)
        self.record = Record(wanted.seed, restarts=wanted.restarts + 1)
        return False

    def step(self, text: str) -> Coroutine[Any, Any, Step]:
        """One turn of the environment, to be awaited under a deadline.

        Raises: EpisodeError: it raised, or answered something else.
        """
        call = self._step(text)
        call.__qualname__ = self._call_name("step")  # what a wait for it is called
        return call

    async def close(self) -> None:
        """Close the environment; what that raises is only logged."""
        environment, self._environment = self._environment, None
        try:
            if environment is not None:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._caller.call(environment.close)
        except Exception as error:  # noqa: BLE001 - the episode is over, and foreign code
            logger.warning("%s: close() failed: %r", self.name, error)
        finally:
            self._caller.end()

    async def _step(self, text: str) -> Step:
        assert self._environment is not None
        step = checked_step(await self._named("step", self._environment.step, text))
        self._keep(self.record.after(text, step))
        return step

    async def _reset(self) -> Observation:
        assert self._environment is not None
        return checked_observation(
            await self._within("reset", self._environment.reset, self.record.seed)
        )

    async def _within(self, what: str, function: Any, *args: Any) -> Any:
        call = self._named(what, function, *args)
        return await within_deadline(call, self._timeout_s, self._call_name(what))

    async def _named(self, what: str, function: Any, *args: Any) -> Any:
        try:
            return await self._caller.call(function, *args)
        except ConfigError:
            raise
        except Exception as error:
            raise EpisodeError(
                f"{self._call_name(what)} raised {type(error).__name__}: {error}"
            ) from error

    def _call_name(self, what: str) -> str:
        return f"{self.name}: {what}"

    def _keep(self, record: Record) -> None:
        self.record = record
        # A dict of its own each time: copies of the sample hold the old one.
        self._sample.metadata[EPISODE] = asdict(record)


def _row_settings(sample: Sample) -> dict[str, Any]:
    settings = sample.metadata.get(SETTINGS, {})
    if not isinstance(settings, dict):
        raise DataError(
            f"sample {sample.index}: metadata.{SETTINGS} must be an object, found {settings!r:.80}"
        )
    return cast(dict[str, Any], settings)


def _seed(args: Any, sample: Sample, evaluation: bool) -> int:
    """The row's, or one of the group's: members of a group play the same episode."""
    seed = sample.metadata.get(SEED)
    if seed is None:
        group = sample.group_index if sample.group_index is not None else sample.index or 0
        stream = "environment/eval" if evaluation else "environment"
        return sampling_seed(args.rollout_seed, stream, group)
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise DataError(
            f"sample {sample.index}: metadata.{SEED} must be a whole number in [0, 2**31), found "
            f"{seed!r:.80}"
        )
    return seed


def _digest(before: str, observation: Observation) -> str:
    return blake2b(f"{before}/{observation!r}".encode(), digest_size=16).hexdigest()


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of an environment's info, leaving out the rest."""
    values = {
        str(name): value.item() if isinstance(value, np.generic) else value
        for name, value in info.items()
    }
    return {name: value for name, value in values.items() if isinstance(value, _PLAIN)}
