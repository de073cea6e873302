"""Weights that come while answers are written: rollout, router, engine and transport as in a run.

Real processes: the embedded engine, and stock SGLang in `make test-sglang`. Each answer begins under
one model and ends under another; both are known, so every log-prob has one right value.
"""

import argparse
import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.device import DEVICE
from support.engine_http import (
    CONTEXT,
    PROMPT,
    TIMEOUT_S,
    expected_log_probs,
    is_idle,
    until,
)
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
from slime.rollout.groups import generate_and_rm_group
from slime.rollout.state import GenerateState
from slime.weights.gloo import GlooTransport
from slime.weights.receiver import ReceiverTransport
from slime.weights.sync import sync_weights

Status = Sample.Status
TOLERANCE = (
    1e-4 if DEVICE == "cpu" else 0.1
)  # bf16; other weights are further away in some token of a span
NUM_SAMPLES = 6
LENGTH = 400
# What a prompt cache would be tempted by: longer than a page of it.
LONG_PROMPT = [3 + i % 50 for i in range(90)]


@dataclass
class World:
    """A router, an engine, and what feeds it.

    Attributes:
        version: of the engine's weights.
    """

    router: Router
    url: str
    model_path: Path
    control: EngineControl
    transport: Any
    is_sglang: bool
    version: int = 0

    def args(self, mode: PauseMode, **more: Any) -> argparse.Namespace:
        return make_args(
            self.router.url,
            engine_urls=[self.url],
            hf_checkpoint=str(self.model_path),
            update_weight_pause_mode=mode.value,
            request_timeout_s=TIMEOUT_S,
            **more,
        )

    def sync(self, model: Any, mode: PauseMode) -> None:
        """Give the engine a model's weights, as a training rank does."""
        self.version += 1
        sync_weights(
            model.state_dict().items(),
            control=self.control,
            transport=self.transport,
            version=str(self.version),
            bucket_bytes=50_000,
            verify=True,
            pause_mode=mode,
        )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder, "qwen3", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [tiny_model("qwen3", seed=i, max_position_embeddings=CONTEXT) for i in (5, 6, 7)]


@pytest.fixture(
    scope="module",
    params=[
        "embedded",
        pytest.param("sglang", marks=pytest.mark.sglang),
        pytest.param("sglang without prefix cache", marks=pytest.mark.sglang),
    ],
)
def world(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    logs, is_sglang = tmp_path_factory.mktemp("logs"), request.param != "embedded"
    has_cache = request.param != "sglang without prefix cache"
    if is_sglang:
        options = ["--custom-weight-loader", RECEIVER, "--max-total-tokens", "65536"]
        options += [] if has_cache else ["--disable-radix-cache"]
        spec = sglang_spec(model_path, logs, "--max-running-requests", "16", *options)
    else:
        spec = engine_spec(model_path, logs, "--max-running-requests", "16")
    with running(spec):
        router = Router.start(
            host="127.0.0.1", log_path=logs / "router.log", options={},
            request_timeout_s=TIMEOUT_S, timeout_s=START_TIMEOUT_S,
        )  # fmt: skip
        router.add_engines([spec.url], START_TIMEOUT_S)
        control = EngineControl([spec.url], timeout_s=TIMEOUT_S)
        where: dict[str, Any] = {"host": "127.0.0.1", "timeout_s": TIMEOUT_S}
        if is_sglang:
            transport = ReceiverTransport(control, way="gloo", flushes=has_cache, **where)
        else:
            transport = GlooTransport(control, **where)
        transport.open()
        yield World(router, spec.url, model_path, control, transport, is_sglang)
        transport.close()
        control.close()
        router.stop()


@pytest.fixture
async def http(world: World) -> Any:
    async with httpx.AsyncClient(base_url=world.url, timeout=TIMEOUT_S, trust_env=False) as client:
        yield client
        await until(client, is_idle)
    await close_clients()


def modes(world: World) -> list[PauseMode]:
    """Pauses that give right answers on this engine."""
    if not world.is_sglang:
        return list(PauseMode)
    has_cache = world.transport._flushes
    return [PauseMode.ABORT] if has_cache else [PauseMode.RETRACT, PauseMode.IN_PLACE]


def skip_unless_right(world: World, mode: PauseMode) -> None:
    if mode not in modes(world):
        pytest.skip("not for this engine, see docs/stock.md")


def sample(index: int, prompt: list[int] = PROMPT) -> Sample:
    return Sample(index=index, prompt="", tokens=list(prompt), session_id=f"s{index}")


def params(seed: int, length: int = LENGTH) -> dict[str, Any]:
    return {"max_new_tokens": length, "ignore_eos": True, "temperature": 1.0, "sampling_seed": seed}


async def written_through(
    world: World,
    http: httpx.AsyncClient,
    mode: PauseMode,
    models: list[Any],
    prompt: list[int] = PROMPT,
) -> list[Sample]:
    """Samples that began under the first model and went on under each of the others."""
    args = world.args(mode)
    await asyncio.to_thread(world.sync, models[0], mode)
    await GenerateState(args).learn_version()
    samples = [sample(i, prompt) for i in range(NUM_SAMPLES)]
    tasks = [asyncio.create_task(generate(args, s, params(s.index or 0))) for s in samples]
    for model in models[1:]:
        await until(http, lambda load: load["num_running_reqs"] == NUM_SAMPLES)
        await asyncio.to_thread(world.sync, model, mode)
    return list(await asyncio.gather(*tasks))


def check_log_probs(
    written: Sample, models_by_version: dict[str, Any], prompt: list[int] = PROMPT
) -> None:
    """Every token has the log-prob of the model that its span names."""
    response = written.tokens[len(prompt) :]
    assert written.rollout_log_probs is not None
    ends = [first for first, _ in written.version_spans[1:]] + [written.response_length]
    for (first, version), end in zip(written.version_spans, ends, strict=True):
        expected = expected_log_probs(models_by_version[version], prompt, response)
        found = written.rollout_log_probs[first:end]
        assert found == pytest.approx(expected[first:end], abs=TOLERANCE)


async def check_no_old_prefix(world: World, mode: PauseMode, model: Any, prompt: list[int]) -> None:
    """A new request with a prompt that was read under older weights is answered by `model` alone."""
    fresh = await generate(world.args(mode), sample(99, prompt), params(99, 12))
    expected = expected_log_probs(model, prompt, fresh.tokens[len(prompt) :])
    assert fresh.rollout_log_probs == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_running_answers_go_on_with_new_weights_and_tell_where(
    world: World, http: httpx.AsyncClient, models: list[Any], mode: PauseMode
) -> None:
    skip_unless_right(world, mode)
    samples = await written_through(world, http, mode, models, LONG_PROMPT)
    last = world.version
    versions = {str(last - 2 + i): model for i, model in enumerate(models)}
    for written in samples:
        assert written.status is Status.TRUNCATED
        assert written.response_length == LENGTH
        written.validate()
        named = [version for _, version in written.version_spans]
        if world.is_sglang and mode is not PauseMode.ABORT:
            # Nobody knows the split; that there is one is not kept quiet.
            assert named == [f"{last - 2}..{last}"]
        else:
            assert named == list(versions)
        if named == list(versions) and mode is not PauseMode.IN_PLACE:
            check_log_probs(written, versions, LONG_PROMPT)
        if mode is PauseMode.RETRACT:
            # Whoever wrote the middle, the end was read and written by the last weights.
            expected = expected_log_probs(models[-1], LONG_PROMPT, written.tokens[90:])[-20:]
            assert (written.rollout_log_probs or [])[-20:] == pytest.approx(expected, abs=TOLERANCE)
    await check_no_old_prefix(world, mode, models[-1], LONG_PROMPT)


@pytest.mark.parametrize("mode", list(PauseMode))
async def test_a_request_that_comes_during_the_pause_is_the_new_weights_alone(
    world: World, http: httpx.AsyncClient, models: list[Any], mode: PauseMode
) -> None:
    skip_unless_right(world, mode)
    args = world.args(mode)
    await asyncio.to_thread(world.sync, models[0], mode)
    await generate(args, sample(0, LONG_PROMPT), params(0, 12))
    begun = threading.Event()

    def sync_slowly() -> None:
        named = models[1].state_dict().items()

        def after_the_pause() -> Iterator[tuple[str, Any]]:
            begun.set()
            yield from named

        world.version += 1
        sync_weights(
            after_the_pause(), control=world.control, transport=world.transport,
            version=str(world.version), bucket_bytes=5_000, verify=True, pause_mode=mode,
        )  # fmt: skip

    syncing = asyncio.create_task(asyncio.to_thread(sync_slowly))
    await asyncio.to_thread(begun.wait, TIMEOUT_S)
    late = await generate(args, sample(1, LONG_PROMPT), params(1, 12))
    await syncing
    assert late.version_spans[-1][1].endswith(str(world.version))
    expected = expected_log_probs(models[1], LONG_PROMPT, late.tokens[90:])
    assert late.rollout_log_probs == pytest.approx(expected, abs=TOLERANCE)


async def test_many_syncs_in_a_row_lose_nothing(
    world: World, http: httpx.AsyncClient, models: list[Any]
) -> None:
    mode = modes(world)[0]
    args = world.args(mode)
    tasks: list[asyncio.Task[Sample]] = []
    for i in range(6):
        await asyncio.to_thread(world.sync, models[i % 3], mode)
        tasks += [asyncio.create_task(generate(args, sample(2 * i + j), params(i))) for j in (0, 1)]
    samples = await asyncio.gather(*tasks)
    assert {s.response_length for s in samples} == {LENGTH}
    if not world.is_sglang or mode is PauseMode.ABORT:
        versions = {str(world.version - 5 + i): models[i % 3] for i in range(6)}
        for written in samples:
            check_log_probs(written, versions)


async def test_a_group_in_one_request_goes_on_too(
    world: World, http: httpx.AsyncClient, models: list[Any]
) -> None:
    mode = PauseMode.ABORT
    skip_unless_right(world, mode)
    facts: dict[str, Any] = {"engine_supports_group_seeds": True}
    if world.is_sglang:  # which takes no seed for each answer of a request
        facts = {"engine_heeds_seeds": False}
    args = world.args(mode, **facts)
    await asyncio.to_thread(world.sync, models[0], mode)
    group = [sample(i) for i in range(4)]
    limits = {name: value for name, value in params(0).items() if name != "sampling_seed"}
    task = asyncio.create_task(generate_and_rm_group(args, group, limits))
    await until(http, lambda load: load["num_running_reqs"] == 4)
    await asyncio.to_thread(world.sync, models[1], mode)
    await task
    last = world.version
    for written in group:
        assert [version for _, version in written.version_spans] == [str(last - 1), str(last)]
        check_log_probs(written, {str(last - 1): models[0], str(last): models[1]})
        assert (written.status, written.reward) == (Status.TRUNCATED, 1.0)
    assert len({tuple(written.tokens) for written in group}) == 4


async def test_groups_that_an_abort_meets_at_any_time_are_whole(
    world: World, http: httpx.AsyncClient
) -> None:
    """SGLang reads a group's prompt before it begins its answers, and refuses groups aborted there."""
    if not world.is_sglang:
        pytest.skip("the embedded engine begins a group's answers at once")
    mode = modes(world)[0]
    args = world.args(mode, engine_heeds_seeds=False)
    await GenerateState(args).learn_version()

    async def asked(number: int) -> list[Sample]:
        group = [sample(8 * number + i, [*LONG_PROMPT[:-1], number]) for i in range(8)]
        for one in group:
            one.group_index = number
        await asyncio.sleep(0.01 * number)
        await generate_and_rm_group(args, group, {"max_new_tokens": 32, "ignore_eos": True})
        return group

    tasks = [asyncio.create_task(asked(number)) for number in range(24)]
    while not all(task.done() for task in tasks):
        await http.post("/abort_request", json={"abort_all": True})
        await asyncio.sleep(0.15)
    for group in await asyncio.gather(*tasks):
        assert {(s.status, s.response_length) for s in group} == {(Status.TRUNCATED, 32)}
        # On CUDA the server is deterministic: without seeds all have the same one.
        if DEVICE == "cpu":
            assert len({tuple(s.tokens) for s in group}) > 1


async def test_the_abort_of_a_round_is_not_gone_on_with(
    world: World, http: httpx.AsyncClient, models: list[Any]
) -> None:
    mode = modes(world)[0]
    args = world.args(mode)
    state = GenerateState(args)
    task = asyncio.create_task(generate(args, sample(0), params(0, CONTEXT - 100)))
    await until(http, lambda load: load["num_running_reqs"] == 1)
    state.aborted = True
    await asyncio.to_thread(world.sync, models[0], PauseMode.ABORT)
    assert (await task).status is Status.ABORTED
