"""How fast the embedded engine writes tokens, and what reading a group's prompt once gains.

    OMP_NUM_THREADS=1 python benchmarks/embedded_engine.py [--rounds 5] [--skip-http]

Prints one JSON object. Rounds of all cases are interleaved, so that a busy machine disturbs all of
them alike; each case reports its best and its median round.
"""

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import transformers

from slime.engines.client import EngineClient, close_clients
from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.requests import Request
from slime.engines.embedded.scheduler import Scheduler, SchedulerLimits
from slime.engines.ports import hold_port
from slime.engines.protocol import SamplingParams
from slime.engines.servers import ServerProcess, ServerSpec

Json = dict[str, Any]
PROMPT_TOKENS = 20


def quick_model() -> Any:
    """The quickstart's shape: Qwen3, 2 layers, hidden 96, 0.2 M parameters."""
    return _model(vocab=64, hidden=96, layers=2, heads=3, kv_heads=1, inner=288, tied=True)


def small_model() -> Any:
    """4.5 M parameters: Qwen3, 4 layers, hidden 256, vocabulary 4096."""
    return _model(vocab=4096, hidden=256, layers=4, heads=8, kv_heads=4, inner=512, tied=False)


def _model(
    *, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, tied: bool
) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32,
        max_position_embeddings=1024, tie_word_embeddings=tied,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def prompts(num: int, vocab: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random prompts of one length."""
    return np.random.default_rng(0).integers(2, vocab, (num, tokens)).tolist()


# --- without HTTP ---


def in_process(
    runner: ModelRunner, *, groups: int, group_size: int, new_tokens: int, share: bool,
    prompt_tokens: int = PROMPT_TOKENS, max_running: int = 128,
) -> Callable[[], tuple[int, int]]:  # fmt: skip
    """A case that fills a scheduler and drains it; returns (requests, tokens written)."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)

    def run() -> tuple[int, int]:
        limits = SchedulerLimits(max_running=max_running, share_prompts=share)
        scheduler = Scheduler(runner, limits)
        for g, prompt in enumerate(prompts(groups, runner.vocab_size, prompt_tokens)):
            for i in range(group_size):
                scheduler.add(
                    Request(
                        rid=f"{g}_{i}",
                        prompt=np.array(prompt),
                        params=params,
                        stop_ids=(),
                        seed=g * group_size + i,
                        max_out=new_tokens,
                    )
                )
        while scheduler.has_work:
            scheduler.step()
        return groups * group_size, scheduler.stats.generation_tokens

    return run


# --- over HTTP, as the rollout does it ---


@contextmanager
def engines(folder: Path, count: int) -> Iterator[list[str]]:
    """Addresses of engine processes serving the quick model."""
    quick_model().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    servers: list[ServerProcess] = []
    try:
        for i in range(count):
            port = hold_port()
            command = (
                sys.executable, "-m", "slime.engines.embedded.server", "--model-path", str(folder),
                "--port", str(port), "--log-level", "warning",
            )  # fmt: skip
            spec = ServerSpec(
                name=f"engine-{i}", command=command, url=f"http://127.0.0.1:{port}",
                health_path="/health", log_path=folder / f"engine-{i}.log",
                env={"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            servers.append(ServerProcess(spec))
        for server in servers:
            server.wait_healthy(300.0)
        yield [server.spec.url for server in servers]
    finally:
        for server in servers:
            server.stop()


def over_http(
    loop: asyncio.Runner,
    urls: list[str],
    *,
    groups: int,
    group_size: int,
    new_tokens: int,
    one_call: bool,
) -> Callable[[], tuple[int, int]]:
    """A case that sends all requests at once, spread over the engines group by group."""

    async def send(client: EngineClient, url: str, body: Json) -> int:
        answer = await client.post(url + "/generate", body)
        parts = answer if isinstance(answer, list) else [answer]
        return sum(part["meta_info"]["completion_tokens"] for part in parts)

    client = EngineClient("", timeout_s=300.0)

    async def run_all() -> tuple[int, int]:
        calls: list[Any] = []
        for g, prompt in enumerate(prompts(groups, 64)):
            url = urls[g % len(urls)]
            seeds = [g * group_size + i for i in range(group_size)]
            params: Json = {"max_new_tokens": new_tokens, "ignore_eos": True}
            body: Json = {"input_ids": prompt, "return_logprob": True}
            if one_call:
                params["n"] = group_size
                calls.append(
                    send(client, url, {**body, "sampling_params": params, "sampling_seeds": seeds})
                )
                continue
            for seed in seeds:
                own = {**params, "sampling_seed": seed}
                calls.append(send(client, url, {**body, "sampling_params": own}))
        written = await asyncio.gather(*calls)
        return groups * group_size, sum(written)

    return lambda: loop.run(run_all())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *map(chr, range(62, 124))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    )


# --- measuring ---


def measure(cases: dict[str, Callable[[], tuple[int, int]]], rounds: int) -> dict[str, Json]:
    """Per case tokens/s and requests/s; one unmeasured round first."""
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    counts: dict[str, tuple[int, int]] = {}
    for round_id in range(rounds + 1):
        for name, case in cases.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            counts[name] = case()
            if round_id:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    return {name: _summary(*counts[name], wall[name], cpu[name]) for name in cases}


def _summary(num_requests: int, tokens: int, wall: list[float], cpu: list[float]) -> Json:
    best, median = min(wall), statistics.median(wall)
    return {
        "requests": num_requests,
        "tokens": tokens,
        "best_ms": round(best * 1e3, 1),
        "median_ms": round(median * 1e3, 1),
        "best_tokens_per_s": round(tokens / best),
        "median_tokens_per_s": round(tokens / median),
        "median_requests_per_s": round(num_requests / median),
        "tokens_per_cpu_s_of_this_process": round(tokens / min(cpu)),
    }


def main() -> None:
    """Run everything and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-http", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    quick, small = ModelRunner(quick_model()), ModelRunner(small_model())
    shape = {"groups": 32, "group_size": 8, "new_tokens": 9}
    cases = {
        "0.2M 32 groups x 8, 9 tokens, prompts shared": in_process(quick, **shape, share=True),
        "0.2M 32 groups x 8, 9 tokens, not shared": in_process(quick, **shape, share=False),
        "4.5M 64 requests, 128 tokens": in_process(
            small, groups=64, group_size=1, new_tokens=128, share=True
        ),
        "4.5M 8 groups x 8, prompt 256, 32 tokens, shared": in_process(
            small, groups=8, group_size=8, new_tokens=32, share=True, prompt_tokens=256
        ),
        "4.5M 8 groups x 8, prompt 256, 32 tokens, not shared": in_process(
            small, groups=8, group_size=8, new_tokens=32, share=False, prompt_tokens=256
        ),
        "4.5M one request, 128 tokens": in_process(
            small, groups=1, group_size=1, new_tokens=128, share=True
        ),
    }
    results = measure(cases, options.rounds)
    if not options.skip_http:
        with (
            tempfile.TemporaryDirectory() as name,
            engines(Path(name), 2) as urls,
            asyncio.Runner() as loop,
        ):
            over = {
                f"0.2M over HTTP, {count} engine(s), {label}": over_http(
                    loop, urls[:count], **shape, one_call=one_call
                )
                for count in (1, 2)
                for label, one_call in (("n=8 per call", True), ("single calls", False))
            }
            results |= measure(over, options.rounds)
            loop.run(close_clients())
    report = {
        "benchmark": "embedded_engine",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    sys.stdout.write(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode() + "\n")


if __name__ == "__main__":
    main()
