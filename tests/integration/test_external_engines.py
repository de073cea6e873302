"""train.py with engines that somebody else runs, here the test: two embedded ones, of which one dies and comes back."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.engine_server import engine_spec, running
from support.gated_reward import HOLD
from support.train_runs import Run, Work

from slime.engines.servers import ServerProcess
from slime.observability.trackers import read_metrics

pytestmark = pytest.mark.runs

TIMEOUT_S = 120.0
GRPO = (
    "--hf-checkpoint {work}/model --prompt-data {work}/data/train.jsonl --input-key prompt "
    "--label-key label --apply-chat-template --custom-rm-path support.gated_reward.reward "
    "--num-rollout 4 --rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 "
    "--rollout-max-response-len 8 --use-dynamic-batch-size --max-tokens-per-gpu 256 "
    "--advantage-estimator grpo --lr 1e-2 --attention-dropout 0 --hidden-dropout 0 "
    "--rollout-external-engine-addrs "
)


@dataclass
class Story:
    """What happened.

    Attributes:
        run: the finished train.py.
        restored: version of the weights of the engine that came back, while its round was held.
        after: answers of both engines to /model_info when the run was over.
    """

    run: Run
    restored: str
    after: list[dict[str, Any]]


def model_info(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(server.spec.url + "/model_info", timeout=5.0, trust_env=False).json()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def story(work: Work, train: Callable[..., Run]) -> Iterator[Story]:
    hold, folder = work.path / HOLD, work.path / "external"
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        specs = [engine_spec(work.path / "model", work.path) for _ in range(2)]
        first, second = (stack.enter_context(running(spec)) for spec in specs)
        addresses = " ".join(spec.url.removeprefix("http://") for spec in specs)
        tests = Path(__file__).parents[1]
        finished = pool.submit(train, "external", GRPO + addresses, paths=(tests,))
        try:
            metrics = folder / "metrics.jsonl"
            until(lambda: finished.done() or (metrics.exists() and read_metrics(metrics)))
            hold.touch()
            os.kill(second.pid, signal.SIGKILL)
            again = stack.enter_context(running(specs[1]))
            until(lambda: finished.done() or model_info(again)["weight_version"].isdigit())
            restored = model_info(again)["weight_version"]
        finally:
            hold.unlink(missing_ok=True)
        yield Story(finished.result(), restored, [model_info(first), model_info(again)])


def test_the_run_comes_to_its_end(story: Story) -> None:
    assert story.run.code == 0, story.run.output[-3000:]
    assert len(story.run.series("train/loss")) == 4
    assert len(story.run.series("perf/update_weights_verify_time")) == 4


def test_the_engines_had_the_weights_of_the_trainer(story: Story) -> None:
    assert max(story.run.series("train/train_rollout_logprob_abs_diff")) < 1e-4


def test_an_engine_that_came_back_at_its_address_got_its_weights_within_the_round(
    story: Story,
) -> None:
    assert int(story.restored) >= 1
    assert "it is not ours to start" in story.run.output
    assert sum(story.run.series("rollout/engine_restarts")) == 1


def test_the_engines_are_left_running_with_the_last_weights(story: Story) -> None:
    assert [info["weight_version"] for info in story.after] == ["5", "5"]
    assert not list((story.run.folder / "logs").glob("engine-*"))
