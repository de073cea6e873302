"""gymnasium's own environments as text."""

from typing import Any

import gymnasium
import pytest

from slime.environments.gymnasium_text import GymnasiumText
from slime.errors import ConfigError

LAKE: dict[str, Any] = {
    "id": "FrozenLake-v1",
    "kwargs": {"is_slippery": False},
    "actions": ["left", "down", "right", "up"],
}
BLACKJACK: dict[str, Any] = {
    "id": "Blackjack-v1",
    "observe": "support.boards.hand",
    "act": "support.boards.hit_or_stick",
}


def test_words_of_a_discrete_space_walk_to_the_goal():
    lake = GymnasiumText(LAKE)
    assert lake.reset(0) == "0"
    way = ["down", "I think: not left, but DOWN.", "right", "right", "down"]
    for text in way:
        step = lake.step(text)
        assert (step.reward, step.terminated) == (0, False)
    assert step.observation == "14"
    last = lake.step("right")
    assert (last.observation, last.reward, last.terminated, last.truncated) == (
        "15",
        1,
        True,
        False,
    )
    lake.close()


def test_what_a_terminal_shows_marks_the_player_with_brackets():
    lake = GymnasiumText({**LAKE, "observe": "render"})
    assert lake.reset(0) == "[S]FFF\nFHFH\nFFFH\nHFFG"
    assert lake.step("right").observation == "  (Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"


def test_seeds_repeat_an_episode_and_tell_it_from_another():
    def begun(seed: int) -> list[Any]:
        taxi = GymnasiumText({"id": "Taxi-v4", "actions": list("snewpd")})
        start = taxi.reset(seed)
        return [start, *((s.observation, s.reward) for s in map(taxi.step, "snewpdsn"))]

    assert begun(3) == begun(3)
    assert begun(3) != begun(4)


def test_a_text_without_an_action_is_told_and_counted_or_ends_the_episode():
    lake = GymnasiumText({**LAKE, "invalid_reward": -0.5})
    lake.reset(0)
    lake.step("down")
    step = lake.step("leftwards")
    assert step.observation == "That is no action: it has none of left, down, right, up.\n4"
    assert (step.reward, step.terminated, step.info["invalid_action"]) == (-0.5, False, True)
    assert lake.step("down").observation == "8"  # it stood still
    strict = GymnasiumText({**LAKE, "invalid": "end", "invalid_text": "no"})
    strict.reset(0)
    assert strict.step("?").terminated


def test_functions_of_the_user_tell_and_read():
    table = GymnasiumText(BLACKJACK)
    told = table.reset(1)
    assert isinstance(told, list)
    assert "against" in told[0]["content"]
    step = table.step("fold")
    assert step.observation == (f"That is no action: say hit or stick.\n{told[0]['content']}")
    outside = table.step("double")  # the function let it pass, the space does not
    assert "2 is not in Discrete(2)" in str(outside.observation)
    assert table.step("stick").terminated


def test_a_text_environment_needs_its_id_alone():
    guess = GymnasiumText({"id": "support.boards:Guess-v0"})
    assert guess.reset(0) == "0 to 9?"
    number = guess._env.unwrapped.number
    step = guess.step(str((number + 1) % 10))
    assert step.observation in ("higher", "lower")
    assert (step.reward, step.info) == (-0.1, {})
    assert guess.step("x").info["invalid_action"]
    won = guess.step(str(number))
    assert (won.observation, won.reward, won.terminated) == ("yes", 1.0, True)
    guess.reset(0)
    wrong = str((number + 1) % 10)
    assert [guess.step(wrong).truncated for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "gymnasium_text needs 'id'"),
        ({"id": "FrozenLake-v1", "action": []}, "no setting 'action'; did you mean 'actions'"),
        ({"id": "FrozenLake-v1"}, "has 4 actions; name them in order"),
        ({**LAKE, "actions": ["left"]}, "has 4 actions"),
        ({**LAKE, "invalid": "crash"}, 'invalid is "tell" or "end"'),
        ({**LAKE, "id": "FrozenLace-v1"}, "Did you mean: `FrozenLake`"),
        ({**LAKE, "kwargs": {"slippery": 1}}, "raised TypeError"),
        ({"id": "no_such_module:Lake-v0"}, "raised ModuleNotFoundError"),
        ({**BLACKJACK, "act": None}, "has 2 actions"),
        ({**LAKE, "observe": "support.boards.nothing"}, "has no 'nothing'"),
    ],
)
def test_bad_settings_stop_the_run_by_name(settings: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        GymnasiumText(settings)


def test_spaces_that_are_no_words_want_a_function():
    gymnasium.register("Continuous-v0", lambda: _Continuous())
    with pytest.raises(ConfigError, match="give act, the dotted path"):
        GymnasiumText({"id": "Continuous-v0", "kwargs": {"disable_env_checker": True}})


class _Continuous(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(0, 1)
    action_space = gymnasium.spaces.Box(0, 1)
