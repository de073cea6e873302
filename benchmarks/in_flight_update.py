"""What a weight sync in the middle of running answers costs, for each way to pause; prints JSON.

A router, an engine on a CPU with a tiny random model, and slime's own rollout and transport, as in a
run. `--engine sglang` is the stock server of `make setup-sglang-cpu`; without a prefix cache for
retract and in_place, which would be wrong with one.

    .venv/bin/python benchmarks/in_flight_update.py --engine embedded
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
from support.engine_server import START_TIMEOUT_S, engine_spec, running, sglang_spec
from support.rollout_world import make_args
from support.tiny_models import save_tiny_model, tiny_model

from slime.data.sample import Sample
from slime.engines.client import close_clients
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.engines.router import Router
from slime.engines.sglang.invitation import RECEIVER
from slime.rollout.generate import generate
from slime.rollout.state import GenerateState
from slime.weights.gloo import GlooTransport
from slime.weights.receiver import ReceiverTransport
from slime.weights.sync import SyncReport, sync_weights

CONTEXT = 4096
TIMEOUT_S = 120.0
PROMPT = [3 + i % 50 for i in range(200)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["embedded", "sglang"], default="embedded")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=600, help="tokens of each answer")
    parser.add_argument("--syncs", type=int, default=3, help="in the time of these answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--bare-pause", action="store_true", help="pause without ending the requests before"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder), "qwen3", max_position_embeddings=CONTEXT)
        for modes, extra in _servers(options.engine):
            for row in _measured(options, model, Path(folder), modes, extra):
                sys.stdout.write(json.dumps(row) + "\n")


def _servers(engine: str) -> list[tuple[list[PauseMode], list[str]]]:
    if engine == "embedded":
        return [(list(PauseMode), [])]
    rest = [PauseMode.RETRACT, PauseMode.IN_PLACE]
    return [([PauseMode.ABORT], []), (rest, ["--disable-radix-cache"])]


def _measured(
    options: argparse.Namespace, model: Path, logs: Path, modes: list[PauseMode], extra: list[str]
) -> list[dict[str, Any]]:
    running_most = ("--max-running-requests", str(options.samples))
    if options.engine == "embedded":
        spec = engine_spec(model, logs, *running_most)
    else:
        more = ("--custom-weight-loader", RECEIVER, "--max-total-tokens", "65536", *extra)
        spec = sglang_spec(model, logs, *running_most, *more)
    with running(spec):
        router = Router.start(
            host="127.0.0.1", log_path=logs / "router.log", options={},
            request_timeout_s=TIMEOUT_S, timeout_s=START_TIMEOUT_S,
        )  # fmt: skip
        router.add_engines([spec.url], START_TIMEOUT_S)
        kind = _BarePause if options.bare_pause else EngineControl
        control = kind([spec.url], timeout_s=TIMEOUT_S)
        where: dict[str, Any] = {"host": "127.0.0.1", "timeout_s": TIMEOUT_S}
        transport: Any
        if options.engine == "embedded":
            transport = GlooTransport(control, **where)
        else:
            transport = ReceiverTransport(control, way="gloo", flushes=not extra, **where)
        transport.open()
        try:
            bench = _Bench(options, router.url, spec.url, str(model), control, transport)
            return [asyncio.run(bench.row(mode)) for mode in modes]
        finally:
            transport.close()
            control.close()
            router.stop()


class _BarePause(EngineControl):
    def pause(self, mode: str) -> None:
        self.post_all("/pause_generation", {"mode": mode})


class _Bench:
    def __init__(
        self,
        options: argparse.Namespace,
        router: str,
        url: str,
        model: str,
        control: EngineControl,
        transport: Any,
    ) -> None:
        self.options, self.router, self.url, self.model = options, router, url, model
        self.control, self.transport = control, transport
        self.version = 0
        self.weights = [
            tiny_model("qwen3", seed=i, max_position_embeddings=CONTEXT).state_dict()
            for i in (5, 6)
        ]

    async def row(self, mode: PauseMode) -> dict[str, Any]:
        """Seconds of the same answers without and with syncs, medians."""
        await self._answers(mode, 0)  # warm
        still = [(await self._answers(mode, 0))[0] for _ in range(self.options.repeats)]
        runs = [await self._answers(mode, self.options.syncs) for _ in range(self.options.repeats)]
        reports = [report for _, found, _ in runs for report in found]
        base = statistics.median(still)
        moved = statistics.median([seconds for seconds, _, _ in runs])
        await close_clients()
        return {
            "engine": self.options.engine,
            "mode": mode.value + (", bare pause" if self.options.bare_pause else ""),
            "samples": self.options.samples,
            "length": self.options.length,
            "syncs": self.options.syncs,
            "undisturbed_s": round(base, 3),
            "with_syncs_s": round(moved, 3),
            "cost_per_sync_s": round((moved - base) / self.options.syncs, 3),
            "pause_s": round(statistics.median([report.pause_s for report in reports]), 4),
            "send_verify_s": round(
                statistics.median([report.send_s + report.verify_s for report in reports]), 4
            ),
            "resume_s": round(statistics.median([report.resume_s for report in reports]), 4),
            "requests_continued": [count for _, _, count in runs],
        }

    async def _answers(self, mode: PauseMode, syncs: int) -> tuple[float, list[SyncReport], int]:
        args = make_args(
            self.router, engine_urls=[self.url], hf_checkpoint=self.model,
            update_weight_pause_mode=mode.value, request_timeout_s=TIMEOUT_S,
        )  # fmt: skip
        state = GenerateState(args)
        await state.learn_version()
        params = {"max_new_tokens": self.options.length, "ignore_eos": True, "temperature": 1.0}
        samples = [
            Sample(index=i, tokens=list(PROMPT), session_id=f"s{i}")
            for i in range(self.options.samples)
        ]
        start = time.perf_counter()
        tasks = [asyncio.create_task(generate(args, s, params)) for s in samples]
        reports: list[SyncReport] = []
        for _ in range(syncs):
            await self._all_run()
            reports.append(await asyncio.to_thread(self._sync, mode))
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
        assert all(s.response_length == self.options.length for s in samples)
        return seconds, reports, state.num_continued

    async def _all_run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http:
            while True:
                load = (await http.get("/v1/loads?include=core")).json()["loads"][0]
                if load["num_running_reqs"] == self.options.samples:
                    return
                await asyncio.sleep(0.01)

    def _sync(self, mode: PauseMode) -> SyncReport:
        self.version += 1
        return sync_weights(
            self.weights[self.version % 2].items(), control=self.control, transport=self.transport,
            version=str(self.version), bucket_bytes=1 << 20, verify=True, pause_mode=mode,
        )  # fmt: skip


if __name__ == "__main__":
    main()
