import pytest

from slime.config.config import Config
from slime.config.problems import Problems
from slime.errors import ConfigError, ConfigErrors


def test_checks_go_on_behind_a_problem() -> None:
    problems = Problems()
    with problems.caught():
        raise ConfigError("first")
    with problems.caught():
        raise ConfigErrors(["second", "third"])
    problems.add("first")
    assert problems.messages == ["first", "second", "third"]


def test_other_errors_are_not_problems() -> None:
    with pytest.raises(ZeroDivisionError), Problems().caught():
        raise ZeroDivisionError


def test_who_asks_for_a_wrong_value_is_left_out() -> None:
    problems = Problems()
    problems.add("--lr is wrong", spoils=["lr"])
    view, reached = problems.readable(Config(lr=0.5, seed=7)), []
    with problems.caught(spoils=["seed"]):
        reached.append(view.seed)
        reached.append(view.lr)
        reached.append("never")
    assert reached == [7]
    assert problems.messages == ["--lr is wrong"]
    assert problems.spoilt == {"lr", "seed"}


def test_one_problem_keeps_its_own_words() -> None:
    problems = Problems()
    problems.raise_all()
    problems.add("alone")
    with pytest.raises(ConfigError, match=r"^alone$"):
        problems.raise_all()


def test_several_are_numbered() -> None:
    problems = Problems()
    problems.add("one")
    problems.add("two\nlines")
    with pytest.raises(ConfigErrors) as caught:
        problems.raise_all()
    assert str(caught.value) == "2 problems:\n  1. one\n  2. two\n     lines"
    assert caught.value.messages == ("one", "two\nlines")
