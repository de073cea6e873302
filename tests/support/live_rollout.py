"""Rounds of generation on real engines behind the real router, as the flags say, without Ray.

Does what the rollout manager does between the engines and the training batches, in its order.
"""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.engine_server import engine_spec, router_spec, running
from support.scripted_model import MODEL_ARGS

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.config.hooks import ROLLOUT_HOOKS, check_hooks
from slime.data.batch import RolloutBatch
from slime.data.sample import Sample
from slime.engines.router import Router
from slime.engines.servers import ServerSpec
from slime.orchestration.rollout_manager import flatten_samples
from slime.orchestration.training_data import make_batches
from slime.plugins import load_function
from slime.rollout import loop
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from slime.rollout.metrics import eval_metrics, rollout_metrics

START_TIMEOUT_S = 480.0
FLAGS = (
    "--device cpu --actor-num-gpus-per-node 1 --rollout-num-gpus 1 --num-rollout 4 "
    "--rollout-batch-size 2 --n-samples-per-prompt 2 --global-batch-size 4 "
    "--rollout-max-response-len 64 --rollout-timeout-s 120 --request-timeout-s 60 "
    "--attention-dropout 0 --hidden-dropout 0 --use-dynamic-batch-size --max-tokens-per-gpu 512 "
    "--input-key prompt --label-key label --apply-chat-template "
)


@dataclass(frozen=True)
class RoundResult:
    """One round, up to what the trainer gets."""

    output: RolloutFnTrainOutput
    samples: list[Sample]
    batches: list[RolloutBatch]
    metrics: dict[str, float]


class LiveRun:
    """A configured run: data source, args and functions, on engines that are up."""

    def __init__(self, config: Config, facts: dict[str, Any]) -> None:
        self.config = config
        check_hooks(config, ROLLOUT_HOOKS)
        self.args: argparse.Namespace = config.to_namespace(**facts)
        self.data_source: Any = load_function(config.data_source_path)(self.args)

    def generate(self, rollout_id: int = 0) -> RoundResult:
        """One round and the batch of the only training rank."""
        started = time.monotonic()
        function = load_function(self.config.rollout_function_path)
        output = call_rollout_fn(
            function, self.args, rollout_id, self.data_source, evaluation=False
        )
        assert isinstance(output, RolloutFnTrainOutput)
        samples = flatten_samples(output.samples)
        batches, counts = make_batches(
            samples, self.config, self.args, rollout_id=rollout_id, dp_size=1
        )
        metrics = dict(output.metrics or {}) | counts
        seconds = time.monotonic() - started
        return RoundResult(
            output, samples, batches, metrics | rollout_metrics(samples, self.args, seconds)
        )

    def evaluate(self, rollout_id: int = 0) -> tuple[RolloutFnEvalOutput, dict[str, float]]:
        """One evaluation and its metrics."""
        path = self.config.eval_function_path or self.config.rollout_function_path
        output = call_rollout_fn(
            load_function(path), self.args, rollout_id, self.data_source, evaluation=True
        )
        assert isinstance(output, RolloutFnEvalOutput)
        return output, eval_metrics(output.data, self.args)


class LiveRollout:
    """Engines and router for the runs of one test file."""

    def __init__(self, router_url: str, engine_urls: Sequence[str], model: Path) -> None:
        host, port = router_url.removeprefix("http://").split(":")
        self.model = model
        self.facts: dict[str, Any] = {
            "sglang_router_ip": host,
            "sglang_router_port": int(port),
            "engine_urls": list(engine_urls),
            "num_engines": len(engine_urls),
            "engine_supports_group_seeds": True,
        }

    def run(self, prompts: Path, flags: str = "") -> LiveRun:
        """A run on `prompts` with these flags after the common ones."""
        argv = shlex.split(
            f"{MODEL_ARGS} {FLAGS} --hf-checkpoint {self.model} --prompt-data {prompts} {flags}"
        )
        return LiveRun(load_config(argv), self.facts)


@contextmanager
def live_rollout(
    model: Path,
    log_dir: Path,
    *,
    num_engines: int = 1,
    make_spec: Callable[[Path, Path], ServerSpec] = engine_spec,
) -> Generator[LiveRollout]:
    """Engines behind the router while the block runs; embedded ones by default."""
    specs = [make_spec(model, log_dir) for _ in range(num_engines)]
    with ExitStack() as stack:
        router = stack.enter_context(running(router_spec(log_dir)))
        for spec in specs:
            stack.enter_context(running(spec))
        stack.callback(loop.shutdown)
        urls = [spec.url for spec in specs]
        Router(router.spec.url).add_engines(urls, START_TIMEOUT_S)
        yield LiveRollout(router.spec.url, urls, model)


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl of rows."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
