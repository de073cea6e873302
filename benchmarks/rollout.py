"""Tokens per second of a whole rollout against SGLang's own bench client, on the same server.

    python benchmarks/rollout.py --model qwen3-0.6b --out runs/bench [--concurrency 256 1024]

One server, started as a run starts it. In turns: `generate_rollout` with our router, client, groups
and a trivial reward; and `sglang.benchmark.serving` (once `sglang.bench_serving`) straight at the
server, with the same prompts and lengths in the same order and as many requests in flight. The
client runs twice: `same` asks for what slime asks (log-probs, no stream), `default` as it comes
(streamed, no log-probs). The prefix cache is emptied before each.

Every measured run is a row of OUT/rollout-MODEL.jsonl; rows that are there are not measured again,
so that after --limit-s, or a kill, the same command goes on. Prints a line of JSON for each
concurrency: medians, and the median of the ratios of each round.

On a CPU: `--model tiny --device cpu --concurrency 8`, with SGLang on PYTHONPATH as in `make
test-sglang`, or `--engine embedded` (the client is SGLang's in both).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from workload import host, make_model, response_lengths, write_prompts

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.engines.ports import hold_port
from slime.engines.router import Router
from slime.engines.servers import ServerProcess
from slime.observability.garbage import settle_memory
from slime.observability.logging import setup_logging
from slime.plugins import load_function
from slime.registry import ENGINES, lookup
from slime.rollout import loop
from slime.rollout.base_types import call_rollout_fn, flatten

HOST = "127.0.0.1"
START_TIMEOUT_S = 400.0
RUN_TIMEOUT_S = 400.0
GROUP = 8
ROUNDS_PER_SLOT = 2  # requests = this x concurrency
SAME = ("--disable-stream", "--return-logprob")
ARMS: dict[str, tuple[str, ...] | None] = {"slime": None, "same": SAME, "default": ()}
NOT_DONE = 3

Row = dict[str, Any]


class Client:
    """SGLang's bench client in a process of its own."""

    def __init__(self, log: Path) -> None:
        script = str(Path(__file__).with_name("sglang_client.py"))
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip
        self.log = log

    def ready(self) -> None:
        """Return once it has imported SGLang."""
        self._answer("ready")

    def run(self, output: Path, **job: Any) -> Row:
        """What it measured."""
        output.unlink(missing_ok=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"output": str(output), **job}) + "\n")
        self.process.stdin.flush()
        self._answer("done")
        return json.loads(output.read_text().splitlines()[-1])

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def _answer(self, expected: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if line != expected:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"SGLang's bench client: {line or 'it ended'}\n{tail}")


def run_config(options: argparse.Namespace, folder: Path, concurrency: int) -> Config:
    """The configuration of a run that only generates."""
    words = (
        f"--device {options.device} --rollout-engine {options.engine} --hf-checkpoint {folder / 'model'} "
        f"--debug-rollout-only --num-rollout 1000 --rollout-num-gpus {options.gpus} "
        f"--rollout-num-gpus-per-engine {options.gpus} "
        f"--prompt-data {folder / f'prompts-{concurrency}.jsonl'} --input-key prompt "
        f"--rollout-batch-size {ROUNDS_PER_SLOT * concurrency // GROUP} --n-samples-per-prompt {GROUP} "
        f"--rollout-max-response-len {options.longest} --sglang-server-concurrency {concurrency} "
        "--custom-generate-function-path workload.generate --custom-rm-path workload.reward "
        f"{options.words}"
    )
    return load_config(words.split())


class Slime:
    """The rollout path of a run, as the rollout manager calls it."""

    def __init__(self, config: Config, router: Router, engine: str) -> None:
        address, port = router.url.removeprefix("http://").rsplit(":", 1)
        self.args = config.to_namespace(
            sglang_router_ip=address,
            sglang_router_port=int(port),
            engine_urls=[engine],
            num_engines=1,
            engine_supports_group_seeds=config.rollout_engine == "embedded",
        )
        self.data_source = load_function(config.data_source_path)(self.args)
        self.function = load_function(config.rollout_function_path)
        self.round = 0

    def requests(self) -> list[Row]:
        """Prompt ids and length of every request of a round, in the order they are sent."""
        dataset = self.data_source.dataset
        rows: list[Row] = []
        for sample in map(dataset.sample, range(len(dataset))):
            rows += [{"ids": sample.tokens, "length": n} for n in sample.metadata["lengths"]]
        return rows

    def run(self) -> Row:
        """One round: seconds, and the tokens that came back."""
        start = time.perf_counter()
        output = call_rollout_fn(
            self.function, self.args, self.round, self.data_source, evaluation=False
        )
        seconds = time.perf_counter() - start
        self.round += 1
        samples = flatten(output.samples)
        return {
            "seconds": seconds,
            "requests": len(samples),
            "tokens": sum(sample.response_length for sample in samples),
        }


def flush_cache(url: str) -> None:
    """Empty the prefix cache; SGLang refuses while its last requests are being cleared away."""
    deadline = time.monotonic() + 30
    while httpx.post(url + "/flush_cache", timeout=60).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not flush its cache")
        time.sleep(0.2)


@contextmanager
def launched(config: Config, folder: Path, count: int) -> Iterator[list[ServerProcess]]:
    """Servers that are on their way, as a run starts them."""
    launch = lookup(ENGINES, config.rollout_engine)
    processes: list[ServerProcess] = []
    try:
        for index in range(count):
            spec = launch(config, index=index, host=HOST, port=hold_port(), log_dir=folder / "logs")
            processes.append(ServerProcess(spec))
        yield processes
    finally:
        for process in processes:
            process.stop()


@contextmanager
def routed(config: Config, folder: Path, servers: Sequence[ServerProcess]) -> Iterator[Router]:
    """The run's router in front of `servers`, all of them healthy."""
    router = Router.start(
        host=HOST,
        log_path=folder / "logs" / "router.log",
        options=dict(config.router_argv),
        request_timeout_s=config.sglang_router_request_timeout_secs,
        timeout_s=START_TIMEOUT_S,
    )
    try:
        for server in servers:
            server.wait_healthy(START_TIMEOUT_S)
        router.add_engines([server.spec.url for server in servers], START_TIMEOUT_S)
        yield router
    finally:
        router.stop()


@contextmanager
def servers(config: Config, folder: Path) -> Iterator[tuple[str, Router, float]]:
    """A server and the router in front of it; address of the server, router, seconds of the start."""
    start = time.perf_counter()
    with launched(config, folder, 1) as (server,), routed(config, folder, [server]) as router:
        yield server.spec.url, router, time.perf_counter() - start


def measure(
    arm: str, slime: Slime, client: Client, url: str, requests: Path, concurrency: int
) -> Row:
    """One run of one arm: seconds, requests, tokens."""
    words = ARMS[arm]
    if words is None:
        flush_cache(url)
        row = slime.run()
    else:
        count = len(requests.read_text().splitlines())
        found = client.run(
            requests.with_suffix(".out"), base_url=url, requests=str(requests),
            concurrency=concurrency, words=["--num-prompts", str(count), *words],
        )  # fmt: skip
        row = {
            "seconds": found["duration"],
            "requests": found["completed"],
            "tokens": found["total_output_tokens"],
        }
    return {"arm": arm, "concurrency": concurrency, **row}


def read_rows(path: Path) -> list[Row]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(options: argparse.Namespace, rows: Sequence[Row], concurrency: int) -> Row:
    """The line of one concurrency."""
    mine = [row for row in rows if row["concurrency"] == concurrency]
    speed = {
        arm: {row["round"]: row["tokens"] / row["seconds"] for row in mine if row["arm"] == arm}
        for arm in options.arms
    }
    ratios = {
        arm: [speed["slime"][number] / value for number, value in sorted(found.items())]
        for arm, found in speed.items()
        if arm != "slime"
    }
    return {
        "benchmark": "rollout",
        "model": options.model,
        "engine": options.engine,
        "gpus": options.gpus,
        "concurrency": concurrency,
        "requests": mine[0]["requests"],
        "group": GROUP,
        "prompt_tokens": options.prompt_tokens,
        "response_tokens": {"median": options.longest // 4, "longest": options.longest},
        "tokens": mine[0]["tokens"],
        "tokens_per_s": {
            arm: round(statistics.median(v.values()), 1) for arm, v in speed.items()
        },
        "ratio_slime_to": {arm: round(statistics.median(v), 4) for arm, v in ratios.items()},
        "ratios": {arm: [round(x, 4) for x in v] for arm, v in ratios.items()},
        "seconds": {
            arm: [round(row["seconds"], 3) for row in mine if row["arm"] == arm]
            for arm in options.arms
        },
        "server_start_s": mine[-1]["server_start_s"],
        "words": options.words,
        **host(),
    }  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measure what is missing; print what is whole."""
    started = time.monotonic()
    folder = Path(options.out) / f"rollout-{options.model}-{options.engine}"
    folder.mkdir(parents=True, exist_ok=True)
    rows_path = folder.with_suffix(".jsonl")
    rows = read_rows(rows_path)
    done = {(row["concurrency"], row["round"], row["arm"]) for row in rows}
    todo = [
        (concurrency, number)
        for concurrency in options.concurrency
        for number in range(options.rounds)
        if any((concurrency, number, arm) not in done for arm in options.arms)
    ]
    if todo:
        rows = measure_rounds(options, folder, rows_path, todo, started)
    left = [
        c for c in options.concurrency
        if sum(row["concurrency"] == c for row in rows) < options.rounds * len(options.arms)
    ]  # fmt: skip
    for concurrency in options.concurrency:
        if concurrency not in left:
            sys.stdout.write(json.dumps(summary(options, rows, concurrency)) + "\n")
    if left:
        sys.stderr.write(f"not done after {options.limit_s:.0f} s: {left}; run it again\n")
    return NOT_DONE if left else 0


def measure_rounds(
    options: argparse.Namespace, folder: Path, rows_path: Path, todo: Any, started: float
) -> list[Row]:
    """All rows, those of the rounds `todo` added while there is time."""
    client = Client(folder / "client.log")  # it imports while the server starts
    make_model(folder / "model", options.model, options.tokenizer)
    with ExitStack() as stack:
        stack.callback(client.close)
        stack.callback(loop.shutdown)
        config, url, router, start_s = None, "", None, 0.0
        for concurrency in dict.fromkeys(c for c, _ in todo):
            lengths = response_lengths(ROUNDS_PER_SLOT * concurrency, options.longest, concurrency)
            write_prompts(
                folder / f"prompts-{concurrency}.jsonl", folder / "model", lengths=lengths,
                per_prompt=GROUP, tokens=options.prompt_tokens, seed=concurrency,
            )  # fmt: skip
            config = run_config(options, folder, concurrency)
            if router is None:
                url, router, start_s = stack.enter_context(servers(config, folder))
                client.ready()
            slime = Slime(config, router, url)
            settle_memory()
            requests = folder / f"requests-{concurrency}.jsonl"
            requests.write_text("".join(json.dumps(row) + "\n" for row in slime.requests()))
            for arm in options.arms:  # not measured: kernels, connections, graphs
                measure(arm, slime, client, url, requests, concurrency)
            for number in (number for c, number in todo if c == concurrency):
                order = options.arms if number % 2 == 0 else options.arms[::-1]
                done = {
                    (row["concurrency"], row["round"], row["arm"]) for row in read_rows(rows_path)
                }
                for arm in order:
                    if (concurrency, number, arm) in done:
                        continue
                    if time.monotonic() - started > options.limit_s:
                        return read_rows(rows_path)
                    row = measure(arm, slime, client, url, requests, concurrency)
                    check(row, lengths)
                    row |= {"round": number, "server_start_s": round(start_s, 1)}
                    with rows_path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    sys.stderr.write(json.dumps(row) + "\n")
    return read_rows(rows_path)


def check(row: Row, lengths: Sequence[int]) -> None:
    """Both sides must have done all of the work, or their speeds do not compare.

    Raises:
        RuntimeError: a request failed, or was shorter than asked for.
    """
    if row["requests"] != len(lengths) or row["tokens"] != sum(lengths):
        raise RuntimeError(f"{row}, but {len(lengths)} requests of {sum(lengths)} tokens were sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="qwen3-0.6b", help="a shape of workload.py")
    parser.add_argument("--out", default="runs/bench", help="folder of model, logs and rows")
    parser.add_argument("--tokenizer", help="folder with a tokenizer; by default a made-up one")
    parser.add_argument("--engine", choices=("sglang", "embedded"), default="sglang")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="tensor-parallel size of the server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest answer")
    parser.add_argument("--limit-s", type=float, default=420, help="begin no run after so long")
    parser.add_argument("--words", default="", help="more flags of slime, --sglang-... say")
    options = parser.parse_args()
    if "slime" not in options.arms:
        parser.error("--arms: slime is what the others are compared with")
    setup_logging("WARNING")
    sys.exit(run(options))


if __name__ == "__main__":
    main()
