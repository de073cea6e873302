import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.errors import ConfigError
from slime.rollout.rm_hub import gym_reward
from slime.rollout.rm_hub.base import BadReward
from slime.rollout.rm_hub.worker_pool import close_pools

FAKE = Path(__file__).parents[3] / "support" / "fake_reasoning_gym"
IS_INSTALLED = importlib.util.find_spec("reasoning_gym") is not None


def args(**changes: Any) -> SimpleNamespace:
    values = {"label_key": "answer", "reward_workers": 1, "reward_timeout_s": 60.0}
    return SimpleNamespace(**values | {"reasoning_gym_min_score": 0.1} | changes)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    close_pools()
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    yield
    close_pools()


def row(response: str, task: str, label: str = "7") -> Sample:
    return Sample(response=response, label=label, metadata={"source_dataset": task})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>8</think><answer>7</answer>", 1.0),
        (r"so \boxed{7}", 1.0),
        ("7<|im_end|>", 1.0),
        ("<answer>8</answer>", 0.0),  # the task itself pays 0.01
        ("<answer>7</answer> no: <answer>8</answer>", 0.0),
        ("<think><answer>7</answer>", 0.0),
        ("", 0.0),
    ],
)
@pytest.mark.usefixtures("fake")
async def test_the_answer_is_scored_and_crumbs_are_not_kept(response: str, score: float) -> None:
    assert await gym_reward.reward(args(), row(response, "exact")) == score


@pytest.mark.usefixtures("fake")
async def test_a_lower_bound_keeps_partial_credit() -> None:
    kept = args(reasoning_gym_min_score=0.005)
    with pytest.raises(BadReward, match=r"0\.01 for 'xx'"):  # and then says that anything gets it
        await gym_reward.reward(kept, row("8", "exact"))


@pytest.mark.usefixtures("fake")
async def test_a_verifier_that_raises_or_hangs_gives_nothing() -> None:
    assert await gym_reward.reward(args(), row("seven", "raises")) == 0.0
    assert await gym_reward.reward(args(), row("7", "raises")) == 1.0
    started = time.monotonic()
    assert await gym_reward.reward(args(reward_timeout_s=0.5), row("7", "hangs")) == 0.0
    assert time.monotonic() - started < 10
    assert await gym_reward.reward(args(), row("7", "raises")) == 1.0


@pytest.mark.usefixtures("fake")
async def test_a_task_that_pays_for_anything_is_refused_by_name() -> None:
    with pytest.raises(BadReward, match="pays gives 1") as caught:
        await gym_reward.reward(args(), row("7", "pays"))
    assert caught.value.reason == "pays_for_garbage"
    with pytest.raises(BadReward, match="not registered"):
        await gym_reward.reward(args(), row("7", "no_such"))
    with pytest.raises(BadReward, match="source_dataset"):
        await gym_reward.reward(args(), Sample(response="7", label="7"))


@pytest.mark.skipif(IS_INSTALLED, reason="the package is there")
async def test_without_the_package_the_run_is_told_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        await gym_reward.reward(args(), row("7", "exact"))


@pytest.mark.skipif(not IS_INSTALLED, reason="needs reasoning-gym")
async def test_the_real_package() -> None:
    import reasoning_gym

    for task, is_fine in [("chain_sum", True), ("game_of_life_halting", False)]:
        entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
        sample = Sample(response=f"<answer>{entry['answer']}</answer>", label=entry["answer"])
        sample.prompt, sample.metadata = entry["question"], entry["metadata"]
        if is_fine:
            assert await gym_reward.reward(args(), sample) == 1.0
        else:
            with pytest.raises(BadReward, match="for 'xx'"):
                await gym_reward.reward(args(), sample)
    close_pools()
