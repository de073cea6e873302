"""Environments of gymnasium as text: --environment-path slime.environments.gymnasium_text.GymnasiumText.

Whose spaces are text (`gymnasium.spaces.Text`) needs nothing more than its id. Otherwise the settings say how an
observation is told and how an action is read.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from slime.environments.interface import INVALID_ACTION, Observation, Step
from slime.environments.settings import checked_settings
from slime.errors import ConfigError
from slime.plugins import load_function

try:
    import gymnasium
except ImportError as missing:
    raise ImportError(
        "the package gymnasium is missing; install it: pip install 'slime[gymnasium]'"
    ) from missing

# What a terminal shows in colours, such as where the player stands: ESC [ 41m S ESC [ 0m
_HIGHLIGHTED = re.compile(r"\x1b\[\d+(?:;\d+)*m(.*?)\x1b\[0m", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What --environment-args may have.

    Attributes:
        id: as `gymnasium.make` takes it; `my_module:MyLake-v0` imports the module that registers it.
        kwargs: for `gymnasium.make` besides.
        observe: "render": what render() shows as text; a dotted path: fn(observation, env) -> text or messages;
            None: str(observation).
        act: a dotted path: fn(text, env) -> action, which raises ValueError where there is none; None: the text
            itself for a Text space, by `actions` for a Discrete one.
        actions: of a Discrete space, in order, a word each; the last one in the text counts.
        invalid: "tell": a text without an action is told so, and the environment is not asked; "end": the
            episode is terminated.
        invalid_reward: of such a turn.
        invalid_text: what is told then; may have {reason} and {observation}, the latest one.
    """

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    observe: str | None = None
    act: str | None = None
    actions: Sequence[str] | None = None
    invalid: Literal["tell", "end"] = "tell"
    invalid_reward: float = 0.0
    invalid_text: str = "That is no action: {reason}.\n{observation}"


class GymnasiumText:
    """One episode of a gymnasium environment.

    Args:
        settings: as `Settings`.

    Raises:
        ConfigError: a setting is unknown or does not fit, or gymnasium does not make the environment.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = chosen = _checked(settings)
        kwargs = dict(chosen.kwargs)
        if chosen.observe == "render":
            kwargs.setdefault("render_mode", "ansi")
        try:
            self._env: Any = gymnasium.make(chosen.id, **kwargs)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ConfigError(
                f"gymnasium.make({chosen.id!r}, **{kwargs}) raised {type(error).__name__}: {error}"
            ) from error
        self._act = _reader(chosen, self._env)
        self._observe: Callable[[Any, Any], Observation] | None = None
        if chosen.observe not in (None, "render"):
            self._observe = load_function(chosen.observe)
        self._latest: Observation = ""

    def reset(self, seed: int) -> Observation:
        """The first observation as text."""
        observation, _ = self._env.reset(seed=seed)
        return self._told(observation)

    def step(self, text: str) -> Step:
        """What the environment answers to the action in `text`."""
        try:
            action = self._act(text, self._env)
            if not self._env.action_space.contains(action):
                raise ValueError(f"{action!r} is not in {self._env.action_space}")
        except ValueError as error:
            return self._invalid(str(error))
        observation, reward, terminated, truncated, info = self._env.step(action)
        return Step(self._told(observation), reward, terminated, truncated, info)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _told(self, observation: Any) -> Observation:
        if self._observe is not None:
            self._latest = self._observe(observation, self._env)
        elif self._settings.observe == "render":
            shown = _HIGHLIGHTED.sub(r"[\1]", str(self._env.render()))
            self._latest = shown.strip("\n")
        else:
            self._latest = str(observation)
        return self._latest

    def _invalid(self, reason: str) -> Step:
        chosen, latest = self._settings, self._latest
        shown = latest if isinstance(latest, str) else latest[-1].get("content", "")
        return Step(
            chosen.invalid_text.format(reason=reason, observation=shown),
            chosen.invalid_reward,
            terminated=chosen.invalid == "end",
            info={INVALID_ACTION: True},
        )


def _checked(settings: Mapping[str, Any]) -> Settings:
    chosen = checked_settings(Settings, settings, "gymnasium_text")
    if chosen.invalid not in ("tell", "end"):
        raise ConfigError(
            f'--environment-args: invalid is "tell" or "end", found {chosen.invalid!r}'
        )
    return chosen


def _reader(chosen: Settings, env: Any) -> Callable[[str, Any], Any]:
    """The function that reads an action.

    Raises:
        ConfigError: nobody said how.
    """
    if chosen.act is not None:
        return cast(Callable[[str, Any], Any], load_function(chosen.act))
    space = env.action_space
    if isinstance(space, gymnasium.spaces.Text):
        return lambda text, env: text
    if isinstance(space, gymnasium.spaces.Discrete):
        if chosen.actions is None or len(chosen.actions) != space.n:
            raise ConfigError(
                f"--environment-args: {chosen.id} has {space.n} actions; name them in order with "
                f"actions, found {chosen.actions!r}, or read them with a function of your own, act"
            )
        return _last_word(chosen.actions, int(space.start))
    raise ConfigError(
        f"--environment-args: {chosen.id} takes actions of {space}; give act, the dotted path of "
        "fn(text, env) -> action"
    )


def _last_word(actions: Sequence[str], start: int) -> Callable[[str, Any], int]:
    """Reads the action whose word comes last in a text; case does not matter."""
    numbers = {word.lower(): start + i for i, word in enumerate(actions)}
    # The longest first, so that "up left" is not read as "left".
    words = "|".join(re.escape(word) for word in sorted(numbers, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)

    def read(text: str, env: Any) -> int:
        found = pattern.findall(text)
        if not found:
            raise ValueError(f"it has none of {', '.join(actions)}")
        return numbers[found[-1].lower()]

    return read
