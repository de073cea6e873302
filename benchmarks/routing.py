"""Tokens per second of several engines behind the router, by the router's policy, while answers differ in length.

    PYTHONPATH=tests/support/sglang_cpu:.sglang-cpu python benchmarks/routing.py --out runs/bench

Stock SGLang servers (or `--engine embedded`) with random weights, and as many samples in flight as they have places
together: a new one starts when one ends, as in a fully asynchronous run. Lengths have a long tail. Policies take
turns, each with a router of its own in front of the same servers and with the same samples, in an order that rotates.

Measured until the last sample has started: tokens of the answers that ended, and, asked ten times a second, how many
requests run and wait in each engine. Every run is a row of OUT/routing-MODEL-ENGINE.jsonl; rows that are there are
not measured again. Prints a line of JSON: medians, and ratios to the first policy within each round.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rollout import flush_cache, launched, read_rows, routed
from workload import host, make_model, response_lengths

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.data.sample import Sample
from slime.engines.client import close_clients
from slime.observability.logging import setup_logging
from slime.rollout.generate import generate

POLICIES = {
    "default": "",  # manual, min_load
    "round_robin": "--router-policy round_robin",
    "random": "--router-policy random",
    "least_load": "--router-policy least_load",
    "cache_aware": "--router-policy cache_aware",
    "consistent_hashing": "--router-policy consistent_hashing",
}
GROUP = 8
POLL_S = 0.1

Row = dict[str, Any]


def run_config(options: argparse.Namespace, folder: Path, policy: str) -> Config:
    """The configuration of a run that only generates, with this policy."""
    words = (
        f"--device {options.device} --rollout-engine {options.engine} --hf-checkpoint {folder / 'model'} "
        f"--debug-rollout-only --num-rollout 1 --rollout-num-gpus {options.engines} "
        f"--rollout-num-gpus-per-engine 1 --rollout-batch-size 1 --prompt-data {folder / 'prompts.jsonl'} "
        f"--input-key prompt --custom-rm-path workload.reward --sglang-max-running-requests {options.places} "
        f"{POLICIES[policy]} {options.words}"
    )
    return load_config(words.split())


def make_samples(options: argparse.Namespace) -> list[tuple[Sample, int]]:
    """Samples in groups with one prompt each, and the tokens each of them is to write."""
    count = options.samples_per_place * options.engines * options.places
    numbers = np.random.default_rng(options.seed)
    prompts = numbers.integers(2, 500, (count // GROUP, options.prompt_tokens)).tolist()
    lengths = response_lengths(
        count, options.longest, options.seed, median=options.median, sigma=options.sigma
    )
    return [
        (Sample(index=i, group_index=i // GROUP, tokens=list(prompts[i // GROUP])), lengths[i])
        for i in range(len(prompts) * GROUP)
    ]


async def measure(options: argparse.Namespace, args: argparse.Namespace) -> Row:
    """All samples once, through the router that `args` names."""
    gate = asyncio.Semaphore(options.engines * options.places)
    samples = make_samples(options)
    num_tokens = 0

    async def answer(sample: Sample, length: int) -> None:
        nonlocal num_tokens
        async with gate:
            await generate(args, sample, {"max_new_tokens": length, "ignore_eos": True})
        if sample.response_length != length:
            raise RuntimeError(f"{sample.response_length} tokens came back of {length}")
        num_tokens += length

    start = time.perf_counter()
    tasks = [asyncio.create_task(answer(*each)) for each in samples]
    loads: list[list[tuple[int, int]]] = []
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        await asyncio.sleep(POLL_S)
        while gate.locked() and not any(task.done() and task.exception() for task in tasks):
            loads.append(await asyncio.gather(*(load_of(http, url) for url in args.engine_urls)))
            await asyncio.sleep(POLL_S)
    full_s, full_tokens = time.perf_counter() - start, num_tokens
    await asyncio.gather(*tasks)
    await close_clients()
    means = np.asarray(loads).mean(0)
    return {
        "tokens_per_s": round(full_tokens / full_s, 1),
        "full_s": round(full_s, 3),
        "all_s": round(time.perf_counter() - start, 3),
        "tokens": num_tokens,
        "running": means[:, 0].round(1).tolist(),
        "queued": means[:, 1].round(1).tolist(),
        "polls": len(loads),
    }


async def load_of(http: httpx.AsyncClient, url: str) -> tuple[int, int]:
    """Requests that run, and that wait, in one engine."""
    answer = (await http.get(f"{url}/v1/loads?include=core")).raise_for_status().json()
    loads = answer["loads"]
    running = sum(load["num_running_reqs"] for load in loads)
    return running, sum(load["num_waiting_reqs"] for load in loads)


def run(options: argparse.Namespace) -> None:
    """Measure what is missing; print the summary."""
    folder = Path(options.out) / f"routing-{options.model}-{options.engine}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text('{"prompt": "w2"}\n')
    rows_path = folder.with_suffix(".jsonl")
    todo = list(missing(options, read_rows(rows_path)))
    if todo:
        make_model(folder / "model", options.model, None)
        configs = {policy: run_config(options, folder, policy) for policy in options.policies}
        first = options.policies[0]
        with launched(configs[first], folder, options.engines) as servers:
            urls = [server.spec.url for server in servers]
            for number, policy in [(-1, first), *todo]:  # the first one warms up
                with routed(configs[policy], folder, servers) as router:
                    row = measure_policy(options, configs[policy], router.url, urls)
                if number < 0:
                    continue
                row = {"round": number, "policy": policy, **row}
                with rows_path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                sys.stderr.write(json.dumps(row) + "\n")
    sys.stdout.write(json.dumps(summary(options, read_rows(rows_path))) + "\n")


def missing(options: argparse.Namespace, rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """Rounds and policies without a row, in the order they are measured."""
    done = {(row["round"], row["policy"]) for row in rows}
    for number in range(options.rounds):
        shift = number % len(options.policies)
        for policy in [*options.policies[shift:], *options.policies[:shift]]:
            if (number, policy) not in done:
                yield number, policy


def measure_policy(
    options: argparse.Namespace, config: Config, router: str, engines: Sequence[str]
) -> Row:
    """One run behind a router that has just started."""
    for url in engines:
        flush_cache(url)
    address, port = router.removeprefix("http://").rsplit(":", 1)
    args = config.to_namespace(
        sglang_router_ip=address, sglang_router_port=int(port), engine_urls=list(engines),
        num_engines=len(engines),
    )  # fmt: skip
    load = os.getloadavg()[0]
    return {**asyncio.run(measure(options, args)), "load": round(load, 1)}


def summary(options: argparse.Namespace, rows: Sequence[Row]) -> Row:
    """Medians of each policy, and its ratios to the first one's runs."""
    by_policy = {
        policy: [row for row in rows if row["policy"] == policy] for policy in options.policies
    }
    first = {row["round"]: row["tokens_per_s"] for row in by_policy[options.policies[0]]}
    return {
        "benchmark": "routing",
        "model": options.model,
        "engine": options.engine,
        "engines": options.engines,
        "places": options.places,
        "samples": len(make_samples(options)),
        "rounds": options.rounds,
        **{
            policy: {
                "tokens_per_s": statistics.median(row["tokens_per_s"] for row in each),
                "to_first": [
                    round(row["tokens_per_s"] / first[row["round"]], 3) for row in each
                ],
                "running": np.median([sorted(row["running"]) for row in each], 0).tolist(),
                "queued": np.median([sorted(row["queued"]) for row in each], 0).tolist(),
            }
            for policy, each in by_policy.items()
        },
        **host(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="tiny", help="a shape of shapes.py")
    parser.add_argument("--engine", choices=("sglang", "embedded"), default="sglang")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--out", default="runs/bench", help="folder of model, logs and rows")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--places", type=int, default=32, help="of each engine")
    parser.add_argument("--samples-per-place", type=int, default=36)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--longest", type=int, default=300, help="tokens of the longest answer")
    parser.add_argument("--median", type=float, default=0.125, help="as a share of the longest")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--words", default="", help="more flags of the run")
    setup_logging("WARNING")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
