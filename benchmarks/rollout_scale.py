"""What the rollout side alone costs, with many samples in flight: the default rollout function on fake engines.

    python benchmarks/rollout_scale.py [--samples 1024 4096 16384] [--tokens 4096] [--engines 64] [--out FILE]

The engines are fakes: 64 HTTP servers in --server-processes processes, which answer /generate after a random
time (uniform up to --seconds) with --tokens tokens and log-probs, made once and not for each request. The
router is left out: the fakes share a port too, and the kernel spreads the connections over the processes.
Everything else is a run's: generate_rollout, its client and checks, samples, a reward that costs nothing,
and the settings of Python's garbage collector in a rollout manager.

Each size runs in a process of its own, with all samples in flight at once, and prints a line of JSON:
samples and tokens per second after the first answer; lag of the event loop (how much later than asked a
5 ms sleep returns); resident memory per sample while the round is held, as it is and after `malloc_trim`
has given back what answers left free in the heap; and CPU seconds of this process.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from slime.config.config import Config
from slime.data.sample import Sample
from slime.observability.garbage import settle_memory
from slime.rollout import loop
from slime.rollout.base_types import flatten
from slime.rollout.sglang_rollout import generate_rollout

VOCAB = 151_936
PROMPT_TOKENS = 256
GROUP = 8
PROBE_S = 0.005
MIB = 2**20


# --- fake engines ---


def fake_answer(num_tokens: int, seed: int) -> bytes:
    """The JSON of an answer, as SGLang writes it."""
    rng = random.Random(seed)
    entries = [
        [float(np.float32(-rng.expovariate(2.0))), rng.randrange(VOCAB), None]
        for _ in range(num_tokens)
    ]
    meta = {
        "id": "fake",
        "finish_reason": {"type": "length", "length": num_tokens},
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": num_tokens,
        "cached_tokens": 0,
        "weight_version": "1",
        "e2e_latency": 1.0,
        "output_token_logprobs": entries,
    }
    ids = [entry[1] for entry in entries]
    return json.dumps({"text": "fake", "output_ids": ids, "meta_info": meta}).encode()


def serve(sockets: list[socket.socket], num_tokens: int, seconds: float, seed: int) -> None:
    """Fake engines on these sockets, in a process of their own."""
    answers = [fake_answer(num_tokens, seed + i) for i in range(8)]
    rng = random.Random(seed)

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(rng.uniform(0.0, seconds))
        return web.Response(body=rng.choice(answers), content_type="application/json")

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "1"})

    async def run() -> None:
        app = web.Application(client_max_size=2**30)
        app.add_routes([web.post("/generate", generate), web.get("/model_info", info)])
        runner = web.AppRunner(app)
        await runner.setup()
        for sock in sockets:
            await web.SockSite(runner, sock, backlog=4096).start()
        await asyncio.Event().wait()

    asyncio.run(run())


def listen(port: int = 0) -> socket.socket:
    """A socket that others may share."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def start_engines(options: argparse.Namespace) -> tuple[int, list[str], list[Any]]:
    """The shared port, the engines' own addresses, and the processes."""
    shared = listen()
    port = shared.getsockname()[1]
    own = [listen() for _ in range(options.engines)]
    urls = [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in own]
    processes: list[Any] = []
    count = options.server_processes
    for number in range(count):
        sockets = [shared if number == 0 else listen(port), *own[number::count]]
        process = multiprocessing.get_context("fork").Process(
            target=serve, args=(sockets, options.tokens, options.seconds, number), daemon=True
        )
        process.start()
        processes.append(process)
    return port, urls, processes


# --- the rollout side ---


async def reward(args: Any, sample: Sample) -> float:
    """For --custom-rm-path."""
    return 1.0


class Prompts:
    """Data source of prompts of fixed length."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 1_000_000

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = [self._group(self.next + i) for i in range(num_samples)]
        self.next += num_samples
        return groups

    def add_samples(self, samples: list[list[Sample]]) -> None:
        raise AssertionError("nothing comes back")

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def _group(self, number: int) -> list[Sample]:
        tokens = [(number + i) % VOCAB for i in range(PROMPT_TOKENS)]
        return [
            Sample(group_index=number, index=number * GROUP + i, prompt="fake", tokens=list(tokens))
            for i in range(GROUP)
        ]


class Lag:
    """How late a short sleep on the rollout's event loop returns, seconds each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.is_over = False

    async def probe(self) -> None:
        while not self.is_over:
            start = time.perf_counter()
            await asyncio.sleep(PROBE_S)
            self.seconds.append(time.perf_counter() - start - PROBE_S)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """One round of `count` samples."""
    port, urls, processes = start_engines(options)
    args = Config().to_namespace(
        rollout_batch_size=count // GROUP,
        n_samples_per_prompt=GROUP,
        rollout_max_response_len=options.tokens,
        rollout_num_gpus=options.engines,
        custom_rm_path="rollout_scale.reward",
        sglang_router_ip="127.0.0.1",
        sglang_router_port=port,
        sglang_server_concurrency=-(-count // options.engines),
        engine_urls=urls,
        num_engines=options.engines,
    )
    settle_memory()
    lag = Lag()
    prober = threading.Thread(target=lambda: loop.run(lag.probe()))
    prober.start()
    time.sleep(0.2)
    lag.seconds.clear()
    before, cpu, start = resident_bytes(), time.process_time(), time.perf_counter()
    output = generate_rollout(args, 0, Prompts())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    lag.is_over = True
    prober.join()
    gc.collect()
    held = resident_bytes() - before
    ctypes.CDLL(None).malloc_trim(0)
    needed = resident_bytes() - before
    samples = [sample for group in output.samples for sample in flatten(group)]
    assert len(samples) == count
    assert all(sample.response_length == options.tokens for sample in samples)
    for process in processes:
        process.terminate()
    late = np.asarray(lag.seconds) * 1000
    return {
        "benchmark": "rollout_scale",
        "samples": count,
        "tokens_each": options.tokens,
        "fake_engines": options.engines,
        "router": "none",
        "answer_seconds_up_to": options.seconds,
        "seconds": round(seconds, 2),
        "samples_per_s": round(count / seconds, 1),
        "tokens_per_s": round(count * options.tokens / seconds),
        "cpu_ms_per_sample": round(1000 * cpu / count, 3),
        "lag_ms": {
            "p50": round(float(np.percentile(late, 50)), 2),
            "p99": round(float(np.percentile(late, 99)), 1),
            "max": round(float(late.max()), 1),
        },
        "kib_per_sample": round(held / count / 1024, 1),
        "kib_per_sample_trimmed": round(needed / count / 1024, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=4096, help="of each answer")
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--server-processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time of an answer")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        sys.stdout.write(json.dumps(measure(options, options.one)) + "\n")
        return
    for count in options.samples:
        words = [sys.executable, __file__, "--one", str(count)]
        for name in ("tokens", "engines", "server_processes", "seconds"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        line = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        sys.stdout.write(line)
        sys.stdout.flush()
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(line)


if __name__ == "__main__":
    main()
