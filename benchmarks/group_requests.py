"""Short answers asked for in one request per group or one per sample: seconds, and whose CPU they take.

    python benchmarks/group_requests.py --device cuda --model qwen3-0.6b --out runs/bench   # on a GPU
    PYTHONPATH=tests/support/sglang_cpu:.sglang-cpu python benchmarks/group_requests.py --out runs/bench

One stock SGLang server and router, started as a run starts them, and the default rollout function on random
weights. Rounds of both ways take turns; the first of each does not count. Prints a line of JSON: medians, the
ratio of each pair, and CPU milliseconds a sample of this process, of the router, and of the server's processes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rollout import flush_cache, servers
from workload import host, make_model, write_prompts

from slime.cli.parse import load_config
from slime.data.sample import Sample
from slime.plugins import load_function
from slime.rollout import loop
from slime.rollout.base_types import call_rollout_fn, flatten

WAYS = {"groups": False, "samples": True}  # engine_heeds_seeds


async def reward(args: Any, sample: Sample) -> float:
    """For --custom-rm-path."""
    return 1.0


def make_args(options: argparse.Namespace, folder: Path) -> Any:
    """The configuration of a run that only generates."""
    words = (
        f"--device {options.device} --rollout-engine sglang --hf-checkpoint {folder / 'model'} "
        f"--debug-rollout-only --num-rollout 1000 --rollout-num-gpus 1 --rollout-num-gpus-per-engine 1 "
        f"--prompt-data {folder / 'prompts.jsonl'} --input-key prompt --custom-rm-path group_requests.reward "
        f"--rollout-batch-size {options.prompts} --n-samples-per-prompt {options.samples} "
        f"--rollout-max-response-len {options.longest} --sglang-server-concurrency "
        f"{options.prompts * options.samples} {options.words}"
    )
    return load_config(words.split())


def processes(url: str) -> dict[str, list[psutil.Process]]:
    """This one, and what listens on the server's port with its children."""
    port = int(url.rsplit(":", 1)[1])
    me = psutil.Process()
    found: dict[str, list[psutil.Process]] = {"slime": [me]}
    for child in me.children(recursive=True):
        words = " ".join(child.cmdline())
        if "sglang.launch_server" in words and str(port) in words:
            found["server_http"] = [child]
            found["server_others"] = child.children(recursive=True)
        elif "smg" in words:
            found.setdefault("router", []).append(child)
    return found


def cpu_seconds(named: Mapping[str, Sequence[psutil.Process]]) -> dict[str, float]:
    """By name, so far."""
    return {
        name: sum(sum(process.cpu_times()[:2]) for process in each) for name, each in named.items()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one server."""
    folder = Path(options.out) / f"group-requests-{options.model}"
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", options.model, None)
    count = options.prompts * options.samples
    write_prompts(
        folder / "prompts.jsonl", folder / "model", lengths=[options.longest] * count,
        per_prompt=options.samples, tokens=options.prompt_tokens, seed=0,
    )  # fmt: skip
    config = make_args(options, folder)
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with servers(config, folder) as (url, router, _):
        address, port = router.url.removeprefix("http://").rsplit(":", 1)
        facts = {"sglang_router_ip": address, "sglang_router_port": int(port), "num_engines": 1}
        all_args = {
            way: config.to_namespace(**facts, engine_urls=[url], engine_heeds_seeds=heeds)
            for way, heeds in WAYS.items()
        }
        source = load_function(config.data_source_path)(all_args["groups"])
        function = load_function(config.rollout_function_path)
        named = processes(url)
        for number in range(options.rounds + 1):
            order = list(WAYS) if number % 2 else list(WAYS)[::-1]
            for way in order:
                flush_cache(url)
                before, start = cpu_seconds(named), time.perf_counter()
                output = call_rollout_fn(function, all_args[way], number, source, evaluation=False)
                seconds, after = time.perf_counter() - start, cpu_seconds(named)
                assert len(flatten(output.samples)) == count
                cpu = {f"cpu_{who}": 1000 * (after[who] - before[who]) / count for who in named}
                rounds[way].append({"seconds": seconds, **cpu})
        loop.shutdown()
    counted = {way: each[1:] for way, each in rounds.items()}
    ratios = [
        one["seconds"] / other["seconds"]
        for one, other in zip(counted["samples"], counted["groups"], strict=True)
    ]
    return {
        "benchmark": "group_requests",
        "model": options.model,
        "prompts": options.prompts,
        "samples_per_prompt": options.samples,
        "prompt_tokens": options.prompt_tokens,
        "longest": options.longest,
        "rounds": options.rounds,
        **{
            way: {name: round(statistics.median(r[name] for r in each), 3) for name in each[0]}
            for way, each in counted.items()
        },
        "seconds_samples_to_groups": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
        "load": round(os.getloadavg()[0], 1),
        "words": options.words,
        **host(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="tiny", help="a shape of shapes.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--longest", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", default="", help="more flags of the run")
    sys.stdout.write(json.dumps(measure(parser.parse_args())) + "\n")


if __name__ == "__main__":
    main()
