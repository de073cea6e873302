"""The engine protocol over HTTP, on real server processes: the embedded engine, and stock SGLang.

The same tests hold for both: whoever develops on the one must meet no surprise on the other.
SGLang runs in `make test-sglang` on a CPU, with stand-ins (tests/support/sglang_cpu), and in
`make test-gpu` as it is. What only the embedded engine does is in test_embedded_engine.py; where
SGLang differs, docs/stock.md says.
"""

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import torch
from safetensors.torch import save
from support.device import DEVICE
from support.engine_http import (
    CONTEXT,
    GREEDY,
    PROMPT,
    TIMEOUT_S,
    GlooTrainer,
    Json,
    expected_log_probs,
    generate,
    ids_beside_log_probs,
    is_idle,
    log_probs,
    long_request,
    post,
    until,
)
from support.engine_server import START_TIMEOUT_S, engine_spec, running, sglang_spec
from support.tiny_models import VOCAB_SIZE, char_tokenizer, save_tiny_model, tiny_model

from slime.config.api_key import API_KEY_VARIABLE
from slime.engines.client import EngineClient
from slime.engines.control import EngineControl
from slime.engines.generated import Limits, output_ids
from slime.engines.router import Router
from slime.errors import EngineProtocolError

KEY = "key-of-these-tests"
# SGLang on CUDA computes in bf16.
TOLERANCE = 2e-5 if DEVICE == "cpu" else 0.1
# Something that waits for the engine has not come back after this long, seconds.
MOMENT_S = 0.3


@dataclass(frozen=True)
class Engine:
    """A running engine and the ways in which the two kinds differ here.

    Attributes:
        heeds_seeds: SGLang does with --enable-deterministic-inference only, which none of its
            attention backends for the CPU can.
        store_prefixes: under which it looks for the weight group `{}`.
    """

    url: str
    is_sglang: bool
    heeds_seeds: bool
    store_prefixes: tuple[str, ...]

    def tensor_body(self, tensors: dict[str, torch.Tensor], **body: Any) -> Json:
        """Tensors in a request: safetensors for the embedded engine, which unpickles nothing."""
        if self.is_sglang:
            data = pickle.dumps(list(tensors.items()))
        else:
            data, body = save(tensors), {"load_format": "safetensors", **body}
        return {"serialized_named_tensors": [base64.b64encode(data).decode()], **body}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("model"), "qwen3", max_position_embeddings=CONTEXT
    )


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.sglang)]
)
def engine(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    is_sglang = request.param == "sglang"
    options = (
        "--max-running-requests", "16", "--served-model-name", "tiny", "--api-key", KEY,
    )  # fmt: skip
    logs = tmp_path_factory.mktemp("logs")
    if is_sglang:
        spec = sglang_spec(model_path, logs, *options, "--max-total-tokens", "65536")
    else:
        spec = engine_spec(model_path, logs, *options)
    with running(spec):
        yield Engine(
            url=spec.url,
            is_sglang=is_sglang,
            heeds_seeds=not is_sglang or DEVICE == "cuda",
            # As torch's new_group nests them, which SGLang goes through.
            store_prefixes=("{}", "{}/", "cpu/") if is_sglang else ("{}",),
        )


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=engine.url, timeout=TIMEOUT_S, headers=headers, trust_env=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def other_model() -> Any:
    return tiny_model("qwen3", seed=3, max_position_embeddings=CONTEXT)


# --- generation ---


async def test_an_answer_carries_tokens_log_probs_and_counts(http: httpx.AsyncClient) -> None:
    answer = await generate(http, rid="abc")
    meta = answer["meta_info"]
    assert meta["id"] == "abc"
    assert answer["output_ids"] == ids_beside_log_probs(answer)
    assert all(value <= 0 for value in log_probs(answer))
    assert meta["completion_tokens"] == len(answer["output_ids"]) <= 8
    assert meta["prompt_tokens"] == len(PROMPT)
    assert meta["finish_reason"]["type"] in ("length", "stop")
    assert isinstance(meta["weight_version"], str)
    assert meta["e2e_latency"] > 0


async def test_log_probs_are_sent_only_when_asked_for(http: httpx.AsyncClient) -> None:
    answer = await generate(http, return_logprob=False)
    assert "output_token_logprobs" not in answer["meta_info"]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.3])
async def test_log_probs_are_the_models_at_the_temperature(
    http: httpx.AsyncClient, model: Any, temperature: float
) -> None:
    answer = await generate(http, {"temperature": temperature, "max_new_tokens": 24})
    expected = expected_log_probs(model, PROMPT, answer["output_ids"], temperature or 1.0)
    assert log_probs(answer) == pytest.approx(expected, abs=TOLERANCE)


async def test_prompt_log_probs_come_without_new_tokens(
    http: httpx.AsyncClient, model: Any
) -> None:
    ids = [*PROMPT, 9, 10]
    scored = await generate(http, {"max_new_tokens": 0}, input_ids=ids, logprob_start_len=0)
    entries = scored["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == ids
    assert entries[0][0] is None
    expected = expected_log_probs(model, ids[:1], ids[1:])
    assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=TOLERANCE)


async def test_the_same_seed_gives_the_same_tokens_in_any_company(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    if not engine.heeds_seeds:
        pytest.skip("SGLang on a CPU has no deterministic inference, and without it no seeds")
    alone = await generate(http, {"ignore_eos": True})
    crowd = await asyncio.gather(
        *(generate(http, {"ignore_eos": True, "sampling_seed": i}) for i in range(12))
    )
    assert crowd[1]["output_ids"] == alone["output_ids"]
    assert len({tuple(answer["output_ids"]) for answer in crowd}) > 6


async def test_greedy_ignores_the_seed(http: httpx.AsyncClient) -> None:
    answers = [await generate(http, {"temperature": 0, "sampling_seed": s}) for s in (1, 2)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


async def test_n_answers_and_batches_come_as_lists(http: httpx.AsyncClient) -> None:
    assert isinstance(await generate(http), dict)
    several = await generate(http, {"n": 3}, rid="several")
    assert len(several) == 3
    ids = {answer["meta_info"]["id"] for answer in several}
    assert len(ids) == 3
    assert all(rid.startswith("several") for rid in ids)
    batch = await generate(http, {"n": 2}, input_ids=[PROMPT, [9, 10]])
    assert [a["meta_info"]["prompt_tokens"] for a in batch] == [4, 4, 2, 2]


async def test_a_stop_token_ends_the_answer_and_stays_in_its_ids(http: httpx.AsyncClient) -> None:
    free = await generate(http, GREEDY)
    stop = free["output_ids"][2]
    answer = await generate(http, {"temperature": 0, "stop_token_ids": [stop]})
    assert answer["output_ids"] == free["output_ids"][:3]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


async def test_ignore_eos_ignores_stop_tokens_too(http: httpx.AsyncClient) -> None:
    free = await generate(http, GREEDY)
    answer = await generate(http, {**GREEDY, "stop_token_ids": [free["output_ids"][2]]})
    assert answer["output_ids"] == free["output_ids"]


async def test_a_stop_string_is_cut_from_the_text_unless_told_otherwise(
    http: httpx.AsyncClient,
) -> None:
    free = await generate(http, GREEDY)
    stop = char_tokenizer().decode(free["output_ids"][3:5])
    params = {**GREEDY, "stop": [stop], "skip_special_tokens": False}
    cut = await generate(http, params)
    whole = await generate(http, {**params, "no_stop_trim": True})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["output_ids"] == whole["output_ids"] == free["output_ids"][:5]
    assert whole["text"].endswith(stop)
    assert cut["text"] == whole["text"].removesuffix(stop)


async def test_text_prompts_are_tokenized(http: httpx.AsyncClient) -> None:
    by_text = await generate(http, GREEDY, text=char_tokenizer().decode(PROMPT))
    assert by_text["output_ids"] == (await generate(http, GREEDY))["output_ids"]


async def test_streaming_grows_to_the_whole_answer(http: httpx.AsyncClient) -> None:
    params = {**GREEDY, "max_new_tokens": 6}
    body = {"input_ids": PROMPT, "sampling_params": params, "stream": True}
    events: list[str] = []
    async with http.stream("POST", "/generate", json=body) as reply:
        async for line in reply.aiter_lines():
            if line:
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    parts = [orjson.loads(event) for event in events[:-1]]
    counts = [part["meta_info"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    whole = await generate(http, params)
    assert parts[-1]["output_ids"] == whole["output_ids"]


@pytest.mark.parametrize(
    "body",
    [
        {"sampling_params": {}},
        {"input_ids": [], "sampling_params": {}},
        {"input_ids": PROMPT, "sampling_params": {"top_p": 5}},
        {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": -3}},
    ],
)
async def test_a_wrong_request_is_refused_with_status_400(
    http: httpx.AsyncClient, body: Json
) -> None:
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


async def test_fields_nobody_knows_pass(http: httpx.AsyncClient) -> None:
    await generate(http, model="unknown", return_text_in_logprobs=False)


async def test_prompt_and_answer_must_fit_into_the_context(http: httpx.AsyncClient) -> None:
    for length, max_new in ((CONTEXT - 3, 8), (CONTEXT, 0), (CONTEXT + 1, 0)):
        body = {"input_ids": [5] * length, "sampling_params": {"max_new_tokens": max_new}}
        reply = await http.post("/generate", json=body)
        assert reply.status_code == 400, (length, max_new)
        assert str(CONTEXT) in reply.json()["error"]["message"]
    open_end = await generate(
        http, {"max_new_tokens": None, "ignore_eos": True}, input_ids=[5] * (CONTEXT - 10)
    )
    reason = open_end["meta_info"]["finish_reason"]
    assert reason["type"] == "length"
    # SGLang leaves the last two places of the context free.
    assert reason["length"] in (8, 10)


# --- abort, pause, disconnect ---


async def test_abort_by_id_returns_what_was_written(http: httpx.AsyncClient) -> None:
    task = await long_request(http, rid="to-abort")
    await post(http, "/abort_request", {"rid": "to-abort"})
    answer = await task
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["completion_tokens"] == len(answer["output_ids"]) > 0
    assert ids_beside_log_probs(answer) == answer["output_ids"]


async def test_abort_by_the_id_of_a_group_ends_all_its_answers(http: httpx.AsyncClient) -> None:
    params = {"max_new_tokens": CONTEXT - 100, "ignore_eos": True, "n": 2}
    task = asyncio.create_task(generate(http, params, rid="group"))
    await until(http, lambda load: load["num_running_reqs"] == 2)
    await post(http, "/abort_request", {"rid": "group"})
    assert {a["meta_info"]["finish_reason"]["type"] for a in await task} == {"abort"}


async def test_abort_all_ends_running_requests(http: httpx.AsyncClient) -> None:
    tasks = [await long_request(http, running=i + 1) for i in range(3)]
    await post(http, "/abort_request", {"abort_all": True})
    answers = await asyncio.gather(*tasks)
    assert {a["meta_info"]["finish_reason"]["type"] for a in answers} == {"abort"}
    await until(http, is_idle)


async def test_aborting_nobody_is_no_error(http: httpx.AsyncClient) -> None:
    await post(http, "/abort_request", {"rid": "nobody"})
    await post(http, "/abort_request", {"abort_all": True})


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_paused_requests_go_on(http: httpx.AsyncClient, mode: str) -> None:
    params = {**GREEDY, "max_new_tokens": 300}
    expected = await generate(http, params)
    task = asyncio.create_task(generate(http, params))
    await until(http, lambda load: load["num_running_reqs"] > 0)
    await post(http, "/pause_generation", {"mode": mode})
    late = asyncio.create_task(generate(http, params))
    done, _ = await asyncio.wait([task, late], timeout=MOMENT_S)
    await post(http, "/continue_generation")
    assert done == set(), "generation went on while it was paused"
    assert (await task)["output_ids"] == expected["output_ids"]
    assert (await late)["output_ids"] == expected["output_ids"]


async def test_a_pause_with_mode_abort_ends_requests(http: httpx.AsyncClient) -> None:
    task = await long_request(http)
    await post(http, "/pause_generation", {"mode": "abort"})
    answer = await task
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert ids_beside_log_probs(answer) == answer["output_ids"]
    await post(http, "/continue_generation")
    await generate(http)


async def test_a_pause_of_an_unknown_mode_is_refused(http: httpx.AsyncClient) -> None:
    assert (await http.post("/pause_generation", json={"mode": "nap"})).status_code == 400


async def test_a_cache_is_flushed_only_while_nothing_runs(http: httpx.AsyncClient) -> None:
    await until(http, is_idle)
    assert (await http.get("/flush_cache")).status_code == 200
    task = await long_request(http, rid="busy")
    assert (await http.get("/flush_cache")).status_code == 400
    await post(http, "/abort_request", {"rid": "busy"})
    await task


async def test_a_client_that_goes_away_frees_its_slot(http: httpx.AsyncClient) -> None:
    task = await long_request(http)
    task.cancel()
    await until(http, is_idle)


# --- weights ---


async def check_weights(http: httpx.AsyncClient, model: Any, version: str) -> None:
    """The engine answers with this model and this version."""
    answer = await generate(http, {**GREEDY, "max_new_tokens": 12})
    assert answer["meta_info"]["weight_version"] == version
    expected = expected_log_probs(model, PROMPT, answer["output_ids"])
    assert log_probs(answer) == pytest.approx(expected, abs=TOLERANCE)


async def test_weights_from_disk_change_answers_and_version(
    http: httpx.AsyncClient, model: Any, other_model: Any, model_path: Path, tmp_path: Path
) -> None:
    other_model.save_pretrained(tmp_path)
    body = {"model_path": str(tmp_path), "weight_version": "7"}
    assert (await post(http, "/update_weights_from_disk", body))["success"]
    await check_weights(http, other_model, "7")
    # Without a version it stays.
    await post(http, "/update_weights_from_disk", {"model_path": str(model_path)})
    await check_weights(http, model, "7")


async def test_a_folder_without_weights_is_refused_and_changes_nothing(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    before = await generate(http, GREEDY)
    body = {"model_path": str(tmp_path / "nothing"), "weight_version": "8"}
    reply = await http.post("/update_weights_from_disk", json=body)
    assert reply.status_code == 400
    assert reply.json()["success"] is False
    after = await generate(http, GREEDY)
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == before["meta_info"]["weight_version"]


async def test_weights_in_a_request(
    http: httpx.AsyncClient, engine: Engine, model: Any, other_model: Any
) -> None:
    for weights, version in ((other_model, "9"), (model, "10")):
        body = engine.tensor_body(weights.state_dict(), weight_version=version)
        assert (await post(http, "/update_weights_from_tensor", body))["success"]
        await check_weights(http, weights, version)


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
async def test_weights_over_a_gloo_group(
    http: httpx.AsyncClient, engine: Engine, model: Any, other_model: Any, load_format: str | None
) -> None:
    if engine.is_sglang and DEVICE == "cuda":
        pytest.skip("on CUDA weights come over NCCL")
    name = f"contract-{load_format}"
    trainer = GlooTrainer(name, tuple(prefix.format(name) for prefix in engine.store_prefixes))
    joined = await post(http, "/init_weights_update_group", trainer.join_request())
    assert joined["success"]
    trainer.wait()
    for weights, version in ((other_model, "12"), (model, "13")):
        reply = await trainer.update(
            http, weights.state_dict(), weight_version=version, load_format=load_format
        )
        assert reply.json()["success"], reply.text
        await check_weights(http, weights, version)
    await post(http, "/destroy_weights_update_group", {"group_name": name})
    again = await http.post("/destroy_weights_update_group", json={"group_name": name})
    assert again.status_code == 400


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_weights_may_come_while_requests_are_paused(
    http: httpx.AsyncClient, engine: Engine, model: Any, other_model: Any, mode: str
) -> None:
    params = {**GREEDY, "max_new_tokens": 400}
    task = asyncio.create_task(generate(http, params))
    await until(http, lambda load: load["num_running_reqs"] > 0)
    await post(http, "/pause_generation", {"mode": mode})
    # With flush_cache, its default, SGLang ends itself: a paused request keeps its cache busy.
    body = engine.tensor_body(other_model.state_dict(), weight_version="14", flush_cache=False)
    await post(http, "/update_weights_from_tensor", body)
    await post(http, "/continue_generation")
    answer = await task
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 400}
    assert answer["meta_info"]["weight_version"] == "14"
    if mode == "retract" and not engine.is_sglang:
        # The embedded engine reads its tokens anew; SGLang finds those before the pause in its
        # cache, as they were under the old weights.
        expected = expected_log_probs(other_model, PROMPT, answer["output_ids"])
        assert log_probs(answer)[-50:] == pytest.approx(expected[-50:], abs=TOLERANCE)
    await until(http, is_idle)
    # SGLang has kept what it read with the old weights, and would use it for the next prompt.
    await post(http, "/flush_cache")
    await check_weights(http, other_model, "14")
    await post(http, "/update_weights_from_tensor", engine.tensor_body(model.state_dict()))
    await check_weights(http, model, "14")


async def test_a_version_can_be_set_while_requests_run(http: httpx.AsyncClient) -> None:
    task = await long_request(http, rid="versions")
    await post(http, "/update_weight_version", {"new_version": "20", "abort_all_requests": False})
    assert (await http.get("/model_info")).json()["weight_version"] == "20"
    await post(http, "/abort_request", {"rid": "versions"})
    assert (await task)["meta_info"]["weight_version"] == "20"


# --- information, keys ---


async def test_information_says_what_is_served(http: httpx.AsyncClient, model_path: Path) -> None:
    info = (await http.get("/model_info")).json()
    assert info["model_path"] == str(model_path)
    assert info["is_generation"] is True
    assert info["model_type"] == "qwen3"
    server = (await http.get("/server_info")).json()
    assert server["max_running_requests"] == 16
    assert server["model_path"] == str(model_path)
    cards = (await http.get("/v1/models")).json()["data"]
    assert [card["max_model_len"] for card in cards] == [CONTEXT]
    # SGLang forgets --served-model-name at the first /update_weights_from_disk.
    assert cards[0]["id"] in ("tiny", str(model_path))


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
async def test_an_engine_that_serves_is_healthy(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200


async def test_nobody_is_let_in_without_the_key_but_to_see_whether_it_lives(
    engine: Engine,
) -> None:
    async with httpx.AsyncClient(base_url=engine.url, timeout=TIMEOUT_S, trust_env=False) as http:
        assert (await http.get("/health")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert (await http.get("/server_info", headers=headers)).status_code == 401
            for path in ("/generate", "/pause_generation", "/update_weights_from_tensor"):
                assert (await http.post(path, json={}, headers=headers)).status_code == 401


# --- slime's own client, and the router between ---


@pytest.fixture(scope="module")
def router(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY_VARIABLE, KEY)
        router = Router.start(
            host="127.0.0.1", log_path=tmp_path_factory.mktemp("router") / "router.log",
            options={}, request_timeout_s=TIMEOUT_S, timeout_s=START_TIMEOUT_S,
        )  # fmt: skip
        try:
            router.add_engines([engine.url], START_TIMEOUT_S)
            yield router
        finally:
            router.stop()


@pytest.fixture(params=["engine", "router"])
async def client(
    request: pytest.FixtureRequest, engine: Engine, router: Router
) -> AsyncIterator[EngineClient]:
    """slime's client, straight to the engine and through the router."""
    url = engine.url if request.param == "engine" else router.url
    client = EngineClient(url, api_key=KEY, timeout_s=TIMEOUT_S)
    yield client
    await client.aclose()


async def test_the_client_reads_answers_and_their_checks_pass(
    client: EngineClient, model: Any
) -> None:
    limits = Limits(max_new_tokens=8, vocab_size=VOCAB_SIZE)
    params = {"max_new_tokens": 8, "temperature": 1.0}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    for body["sampling_params"] in (params, params | {"n": 3}):
        reply = await client.generate(body)
        answers = reply if isinstance(reply, list) else [reply]
        assert len(answers) == body["sampling_params"].get("n", 1)
        for answer in answers:
            ids = output_ids(answer, limits, where="test")
            assert 0 < len(ids) <= 8
            expected = expected_log_probs(model, PROMPT, ids)
            assert log_probs(answer) == pytest.approx(expected, abs=TOLERANCE)


async def test_the_client_reads_an_answer_that_was_aborted(
    client: EngineClient, http: httpx.AsyncClient
) -> None:
    params = {"max_new_tokens": CONTEXT - 100, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    task = asyncio.create_task(client.generate(body))
    await until(http, lambda load: load["num_running_reqs"] > 0)
    await post(http, "/abort_request", {"abort_all": True})
    answer = await task
    assert isinstance(answer, dict)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert output_ids(answer, Limits(vocab_size=VOCAB_SIZE), where="test")


async def test_the_client_names_what_was_refused(client: EngineClient) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"top_p": 5}}
    with pytest.raises(EngineProtocolError, match="top_p"):
        await client.generate(body)


def test_control_calls_reach_the_engine(engine: Engine) -> None:
    control = EngineControl([engine.url], timeout_s=TIMEOUT_S, api_key=KEY)
    control.pause("abort")
    control.resume()
    assert control.get_all("/model_info")[0]["model_type"] == "qwen3"
    with pytest.raises(EngineProtocolError, match="destroy_weights_update_group"):
        control.post_all("/destroy_weights_update_group", {"group_name": "nobody"})
    control.close()
