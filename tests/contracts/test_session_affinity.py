"""Where the real router sends the turns of a conversation and the samples of a group: two engines.

Each engine has its own weight version here, so every answer tells who wrote it.
"""

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import pytest
from support.engine_server import START_TIMEOUT_S, engine_spec, running
from support.rollout_world import make_args
from support.tiny_models import save_tiny_model

from slime.config.routing import router_options
from slime.data.sample import Sample
from slime.engines.client import close_clients
from slime.engines.router import Router
from slime.engines.servers import ServerProcess
from slime.rollout.generate import generate

pytestmark = pytest.mark.runs
TIMEOUT_S = 60.0
NUM_SESSIONS = 16
NUM_TURNS = 3
Status = Sample.Status

BY_KEY: list[dict[str, Any]] = [
    router_options({}),
    {"policy": "consistent_hashing"},
    {"policy": "manual", "assignment_mode": "random"},
    {"policy": "round_robin", "routing_key_override": True},
]
# The hash is of so many first tokens (256 unless told): a shorter prompt would change with each turn.
BY_PREFIX: list[dict[str, Any]] = [
    {"policy": "cache_aware"},
    {"policy": "prefix_hash", "prefix_token_count": 100},
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder, "qwen3", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def engines(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    """Two engines by their weight version."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        running(engine_spec(model_path, logs, "--weight-version", "1")) as one,
        running(engine_spec(model_path, logs, "--weight-version", "2")) as two,
    ):
        yield {"1": one, "2": two}


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    await close_clients()


@contextmanager
def routed(
    engines: dict[str, ServerProcess], options: dict[str, Any], folder: Path, model_path: Path
) -> Iterator[argparse.Namespace]:
    """Args of a run whose router has these options."""
    router = Router.start(
        host="127.0.0.1", log_path=folder / "router.log", options=options,
        request_timeout_s=TIMEOUT_S, timeout_s=START_TIMEOUT_S,
    )  # fmt: skip
    try:
        router.add_engines([engine.spec.url for engine in engines.values()], START_TIMEOUT_S)
        yield make_args(
            router.url,
            engine_urls=[engine.spec.url for engine in engines.values()],
            hf_checkpoint=str(model_path),
            router_argv=options,
            request_timeout_s=TIMEOUT_S,
        )
    finally:
        router.stop()


def conversation(number: int) -> Sample:
    numbers = random.Random(number)
    tokens = [numbers.randrange(3, 60) for _ in range(120)]
    return Sample(index=number, tokens=tokens, session_id=f"session {number}")


async def take_turn(args: argparse.Namespace, sample: Sample) -> str:
    """The engine that answered; a tool's words come before every turn but the first."""
    if sample.response_length:
        sample.append_response_tokens(args, tokens=[5] * 20, trainable=False)
        sample.status = Status.PENDING
    limit = sample.response_length + 8
    await generate(args, sample, {"max_new_tokens": limit, "ignore_eos": True, "sampling_seed": 1})
    assert sample.status is Status.TRUNCATED
    return sample.weight_versions[-1]


@pytest.mark.parametrize("options", [*BY_KEY, *BY_PREFIX], ids=name_of)
async def test_all_turns_of_a_conversation_go_to_one_engine(
    engines: dict[str, ServerProcess], options: dict[str, Any], model_path: Path, tmp_path: Path
) -> None:
    with routed(engines, options, tmp_path, model_path) as args:
        samples = [conversation(i) for i in range(NUM_SESSIONS)]
        for _ in range(NUM_TURNS):
            for sample in samples:
                await take_turn(args, sample)
    assert all(len(set(sample.weight_versions)) == 1 for sample in samples)
    assert {sample.weight_versions[0] for sample in samples} == {"1", "2"}


async def test_without_affinity_turns_wander(
    engines: dict[str, ServerProcess], model_path: Path, tmp_path: Path
) -> None:
    with routed(engines, {"policy": "round_robin"}, tmp_path, model_path) as args:
        sample = conversation(0)
        assert len({await take_turn(args, sample) for _ in range(NUM_TURNS)}) == 2


@pytest.mark.parametrize("options", BY_PREFIX, ids=name_of)
async def test_samples_of_a_group_go_to_the_engine_that_has_their_prompt(
    engines: dict[str, ServerProcess], options: dict[str, Any], model_path: Path, tmp_path: Path
) -> None:
    used = set[str]()
    with routed(engines, options, tmp_path, model_path) as args:
        for number in range(NUM_SESSIONS):
            group = [conversation(number) for _ in range(4)]
            for i, sample in enumerate(group):
                sample.session_id = f"session {number} {i}"
            (engine,) = {await take_turn(args, sample) for sample in group}
            used.add(engine)
    assert used == {"1", "2"}


@pytest.mark.parametrize("options", BY_KEY, ids=name_of)
async def test_when_an_engine_dies_its_conversations_move_and_stay(
    engines: dict[str, ServerProcess], options: dict[str, Any], model_path: Path, tmp_path: Path
) -> None:
    with (
        running(engine_spec(model_path, tmp_path, "--weight-version", "1")) as one,
        routed({"1": one, "2": engines["2"]}, options, tmp_path, model_path) as args,
    ):
        samples = [conversation(i) for i in range(NUM_SESSIONS)]
        before = [await take_turn(args, sample) for sample in samples]
        assert set(before) == {"1", "2"}
        one.kill()
        for _ in range(2):
            assert {await take_turn(args, sample) for sample in samples} == {"2"}
    # What the dead engine wrote is kept, and is told apart from the rest.
    for sample, first in zip(samples, before, strict=True):
        versions = [version for _, version in sample.version_spans if version]
        assert versions == [first, "2", "2"]
        sample.validate()


async def mean_gap(args: argparse.Namespace) -> float:
    """Between the requests at one engine and at the other, while eight times as many samples as are let in
    at once write answers of very different lengths. The router counts."""
    numbers, gate, gaps = random.Random(0), asyncio.Semaphore(NUM_SESSIONS), list[int]()
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"

    async def answer(number: int) -> None:
        sample = conversation(number)
        limit = min(400, int(20 * numbers.lognormvariate(0, 1.2)) + 1)
        params = {"max_new_tokens": limit, "ignore_eos": True, "sampling_seed": 1}
        async with gate:
            await generate(args, sample, params)

    tasks = [asyncio.create_task(answer(i)) for i in range(8 * NUM_SESSIONS)]
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        await asyncio.sleep(0.1)
        # Once the last of them wait no more, which engine is left with work is chance.
        while gate.locked():
            workers = (await http.get("/workers")).json()["workers"]
            loads = [worker["load"] for worker in workers]
            gaps.append(max(loads) - min(loads))
            await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return fmean(gaps)


async def test_requests_go_to_the_engine_with_the_fewest(
    engines: dict[str, ServerProcess], model_path: Path, tmp_path: Path
) -> None:
    with routed(engines, router_options({}), tmp_path, model_path) as args:
        balanced = await mean_gap(args)
    with routed(engines, {"policy": "round_robin"}, tmp_path, model_path) as args:
        in_turns = await mean_gap(args)
    assert 2 * balanced < in_turns
