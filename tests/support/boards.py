"""A text environment of gymnasium's, registered at import; functions for observations and actions."""

import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text


class Guess(gymnasium.Env[str, str]):
    """Says higher or lower until the number is guessed."""

    observation_space = Text(20, charset=string.printable)
    action_space = Text(3, charset="0123456789")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(10))
        return "0 to 9?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        guess = int(action)
        if guess == self.number:
            return "yes", 1.0, True, False, {"number": self.number}
        return ("higher" if guess < self.number else "lower"), -0.1, False, False, {}


gymnasium.register("Guess-v0", Guess, max_episode_steps=4)


def hand(observation: Any, env: Any) -> list[dict[str, str]]:
    """Blackjack's observation as a message of a dealer."""
    mine, dealers, ace = observation
    return [{"role": "tool", "content": f"{mine} against {dealers}{' with an ace' * bool(ace)}"}]


def hit_or_stick(text: str, env: Any) -> int:
    if text not in ("hit", "stick", "double"):
        raise ValueError("say hit or stick")
    return ["stick", "hit", "double"].index(text)
