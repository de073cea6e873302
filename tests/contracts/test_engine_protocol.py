"""The engine protocol over HTTP, against a real server process.

`SLIME_TEST_ENGINE_URL` names a running engine to test instead of an embedded one of our own; tests
that need our model's files or our extensions are then left out.
"""

import asyncio
import base64
import datetime
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import torch
import torch.distributed as dist
from support.engine_server import engine_spec, running
from support.tiny_models import char_tokenizer, save_tiny_model, tiny_model

from slime.engines.checksum import checksum
from slime.engines.servers import ServerProcess, free_port

EXTERNAL = os.environ.get("SLIME_TEST_ENGINE_URL")
CONTEXT = 4096
PROMPT = [5, 6, 7, 8]
TIMEOUT_S = 120.0
ours_only = pytest.mark.skipif(EXTERNAL is not None, reason="needs the embedded engine")

Json = dict[str, Any]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("model"), "qwen3", max_position_embeddings=CONTEXT
    )


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    spec = engine_spec(
        model_path, tmp_path_factory.mktemp("logs"), "--max-running-requests", "16",
        "--served-model-name", "tiny",
    )  # fmt: skip
    with running(spec) as process:
        yield process


@pytest.fixture(scope="module")
def base_url(request: pytest.FixtureRequest) -> str:
    return EXTERNAL or request.getfixturevalue("server").spec.url


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, trust_env=False) as client:
        yield client


async def post(http: httpx.AsyncClient, path: str, body: Json | None = None) -> Any:
    reply = await http.post(path, json=body or {})
    assert reply.status_code == 200, reply.text
    return reply.json() if reply.content.startswith((b"{", b"[")) else reply.text


async def generate(http: httpx.AsyncClient, params: Json | None = None, **body: Any) -> Any:
    sampling = {"max_new_tokens": 8, "sampling_seed": 1, **(params or {})}
    payload = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, **body}
    if "text" in payload:
        del payload["input_ids"]
    return await post(http, "/generate", payload)


async def until(http: httpx.AsyncClient, holds: Callable[[Json], bool]) -> None:
    """Return once the engine's load is as asked; each look is a round trip."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds((await http.get("/v1/loads?include=core")).json()["loads"][0]):
            pass


async def long_request(
    http: httpx.AsyncClient, running: int = 1, **body: Any
) -> "asyncio.Task[Any]":
    """A request that runs for a while; by now it is the `running`-th that does."""
    params = {"max_new_tokens": CONTEXT - 100, "ignore_eos": True}
    task = asyncio.create_task(generate(http, params, **body))
    await until(http, lambda load: load["num_running_reqs"] >= running)
    return task


def meta_ids(answer: Json) -> list[int]:
    return [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]]


# --- generation ---


async def test_an_answer_carries_tokens_log_probs_and_counts(http: httpx.AsyncClient) -> None:
    answer = await generate(http, rid="abc")
    meta = answer["meta_info"]
    assert meta["id"] == "abc"
    assert answer["output_ids"] == meta_ids(answer)
    assert all(entry[0] <= 0 for entry in meta["output_token_logprobs"])
    assert meta["completion_tokens"] == len(answer["output_ids"]) <= 8
    assert meta["prompt_tokens"] == len(PROMPT)
    assert meta["finish_reason"]["type"] in ("length", "stop")
    assert isinstance(meta["weight_version"], str)
    assert meta["e2e_latency"] > 0


async def test_log_probs_are_sent_only_when_asked_for(http: httpx.AsyncClient) -> None:
    answer = await generate(http, return_logprob=False)
    assert "output_token_logprobs" not in answer["meta_info"]


async def test_the_same_seed_gives_the_same_tokens_in_any_company(http: httpx.AsyncClient) -> None:
    alone = await generate(http, {"ignore_eos": True})
    crowd = await asyncio.gather(
        *(generate(http, {"ignore_eos": True, "sampling_seed": i}) for i in range(12))
    )
    assert crowd[1]["output_ids"] == alone["output_ids"]
    assert len({tuple(answer["output_ids"]) for answer in crowd}) > 6


async def test_n_answers_and_batches_come_as_lists(http: httpx.AsyncClient) -> None:
    assert isinstance(await generate(http), dict)
    several = await generate(http, {"n": 3})
    assert len(several) == 3
    batch = await generate(http, {"n": 2}, input_ids=[PROMPT, [9, 10]])
    assert [a["meta_info"]["prompt_tokens"] for a in batch] == [4, 4, 2, 2]


@ours_only
async def test_each_answer_of_a_group_can_have_its_own_seed(http: httpx.AsyncClient) -> None:
    group = await generate(http, {"n": 3, "ignore_eos": True}, sampling_seeds=[4, 5, 6])
    singles = [await generate(http, {"ignore_eos": True, "sampling_seed": s}) for s in (4, 5, 6)]
    assert [a["output_ids"] for a in group] == [a["output_ids"] for a in singles]
    assert [a["meta_info"]["output_token_logprobs"] for a in group] == [
        a["meta_info"]["output_token_logprobs"] for a in singles
    ]


async def test_greedy_ignores_the_seed(http: httpx.AsyncClient) -> None:
    answers = [await generate(http, {"temperature": 0, "sampling_seed": s}) for s in (1, 2)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


async def test_a_stop_token_ends_the_answer_and_stays_in_its_ids(http: httpx.AsyncClient) -> None:
    free = await generate(http, {"ignore_eos": True})
    stop = free["output_ids"][2]
    answer = await generate(http, {"stop_token_ids": [stop]})
    end = free["output_ids"].index(stop) + 1
    assert answer["output_ids"] == free["output_ids"][:end]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@ours_only
async def test_a_stop_string_is_cut_from_the_text_unless_told_otherwise(
    http: httpx.AsyncClient,
) -> None:
    free = await generate(http, {"ignore_eos": True, "skip_special_tokens": False})
    stop = char_tokenizer().decode(free["output_ids"][3:5])
    params = {"stop": [stop], "skip_special_tokens": False, "ignore_eos": True}
    cut = await generate(http, params)
    whole = await generate(http, {**params, "no_stop_trim": True})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["output_ids"] == whole["output_ids"] == free["output_ids"][:5]
    assert whole["text"].endswith(stop)
    assert cut["text"] == whole["text"].removesuffix(stop)


@ours_only
async def test_text_prompts_are_tokenized(http: httpx.AsyncClient) -> None:
    by_text = await generate(http, text=char_tokenizer().decode(PROMPT))
    assert by_text["output_ids"] == (await generate(http))["output_ids"]


async def test_prompt_log_probs_come_without_new_tokens(http: httpx.AsyncClient) -> None:
    body = {"input_ids": [*PROMPT, 9, 10], "logprob_start_len": 0}
    scored = await generate(http, {"max_new_tokens": 0}, **body)
    entries = scored["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == body["input_ids"]
    assert entries[0][0] is None
    assert all(entry[0] < 0 for entry in entries[1:])


async def test_streaming_grows_to_the_whole_answer(http: httpx.AsyncClient) -> None:
    params = {"max_new_tokens": 6, "sampling_seed": 1, "ignore_eos": True}
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


@ours_only
async def test_unknown_parameters_are_named_and_unknown_fields_pass(
    http: httpx.AsyncClient,
) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_token": 3}}
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 400
    assert "max_token" in reply.text
    assert (await http.post("/generate", content=b"{")).status_code == 400
    await generate(http, model="unknown", return_text_in_logprobs=False)


@ours_only
async def test_the_context_ends_an_answer_and_bounds_a_prompt(http: httpx.AsyncClient) -> None:
    answer = await generate(http, {"ignore_eos": True}, input_ids=[5] * (CONTEXT - 3))
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    body = {"input_ids": [5] * (CONTEXT + 1)}
    assert (await http.post("/generate", json=body)).status_code == 400


# --- abort, pause, disconnect ---


async def test_abort_by_id_returns_what_was_written(http: httpx.AsyncClient) -> None:
    task = await long_request(http, rid="to-abort")
    await post(http, "/abort_request", {"rid": "to-abort"})
    answer = await task
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert len(meta["output_token_logprobs"]) == len(answer["output_ids"])


async def test_abort_all_ends_running_and_waiting_requests(http: httpx.AsyncClient) -> None:
    tasks = [await long_request(http, running=i + 1) for i in range(3)]
    await post(http, "/abort_request", {"abort_all": True})
    answers = await asyncio.gather(*tasks)
    assert {a["meta_info"]["finish_reason"]["type"] for a in answers} == {"abort"}
    await until(http, lambda load: load["num_total_reqs"] == 0)
    assert (await http.get("/flush_cache")).status_code == 200


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_paused_requests_go_on(http: httpx.AsyncClient, mode: str) -> None:
    params = {"max_new_tokens": 300, "ignore_eos": True}
    expected = await generate(http, params)
    task = asyncio.create_task(generate(http, params))
    await until(http, lambda load: load["num_running_reqs"] > 0)
    await post(http, "/pause_generation", {"mode": mode})
    assert not task.done()
    late = asyncio.create_task(generate(http, params))
    await until(http, lambda load: load["num_waiting_reqs"] > 0)
    await post(http, "/continue_generation")
    assert (await task)["output_ids"] == expected["output_ids"]
    assert (await late)["output_ids"] == expected["output_ids"]


async def test_a_pause_with_mode_abort_ends_requests(http: httpx.AsyncClient) -> None:
    task = await long_request(http)
    await post(http, "/pause_generation", {"mode": "abort"})
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    await post(http, "/continue_generation")
    await generate(http)


async def test_a_client_that_goes_away_frees_its_slot(http: httpx.AsyncClient) -> None:
    task = await long_request(http)
    task.cancel()
    await until(http, lambda load: load["num_total_reqs"] == 0)


# --- weights ---


@ours_only
async def test_weights_from_disk_change_answers_and_version(
    http: httpx.AsyncClient, model_path: Path, tmp_path: Path
) -> None:
    before = await generate(http)
    other = tiny_model("qwen3", seed=1, max_position_embeddings=CONTEXT)
    other.save_pretrained(tmp_path)
    answer = await post(
        http,
        "/update_weights_from_disk",
        {"model_path": str(tmp_path), "weight_version": "7"},
    )
    assert answer["success"]
    norm = other.state_dict()["model.norm.weight"]
    assert answer["checksums"]["model.norm.weight"] == checksum(norm)
    after = await generate(http)
    assert after["meta_info"]["weight_version"] == "7"
    assert (
        after["meta_info"]["output_token_logprobs"]
        != (before["meta_info"]["output_token_logprobs"])
    )
    await post(http, "/update_weights_from_disk", {"model_path": str(model_path)})
    again = await generate(http)
    assert again["output_ids"] == before["output_ids"]


@ours_only
async def test_weights_in_a_request_and_refusals(http: httpx.AsyncClient) -> None:
    from safetensors.torch import save

    def body(**tensors: torch.Tensor) -> Json:
        part = base64.b64encode(save(tensors)).decode()
        return {"serialized_named_tensors": [part], "load_format": "safetensors"}

    # Powers of two: halving and doubling a norm's weight is exact.
    original = tiny_model("qwen3").state_dict()["model.norm.weight"]
    for factor in (0.5, 1.0):
        tensors = {"model.norm.weight": original * factor}
        answer = await post(http, "/update_weights_from_tensor", body(**tensors))
        assert answer["checksums"] == {"model.norm.weight": checksum(original * factor)}
    for tensors, word in (
        ({"nobody": torch.ones(2)}, "nobody"),
        ({"model.norm.weight": torch.ones(2)}, "model.norm.weight"),
    ):
        reply = await http.post("/update_weights_from_tensor", json=body(**tensors))
        assert reply.status_code == 400
        assert reply.json()["success"] is False
        assert word in reply.json()["message"]
    pickled = {"serialized_named_tensors": ["gASV"], "load_format": "flattened_bucket"}
    reply = await http.post("/update_weights_from_tensor", json=pickled)
    assert "unpickle" in reply.json()["error"]["message"]


class Trainer:
    """Rank 0 of a gloo group, as the protocol describes it."""

    def __init__(self, name: str) -> None:
        self.name, self.port = name, free_port()
        self.group: Any = None
        self._thread = threading.Thread(target=self._connect)
        self._thread.start()

    def _connect(self) -> None:
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        store = dist.TCPStore(
            "127.0.0.1", self.port, 2, is_master=True, timeout=timeout, wait_for_workers=False
        )
        prefixed = dist.PrefixStore(self.name, store)
        self.group = dist.ProcessGroupGloo(prefixed, 0, 2, timeout)

    def join_request(self) -> Json:
        return {
            "master_address": "127.0.0.1",
            "master_port": self.port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.name,
            "backend": "gloo",
        }

    def wait(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert self.group is not None

    def send(self, tensors: list[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for tensor in tensors:
            self.group.broadcast([tensor.contiguous().view(-1)], options).wait()


@ours_only
async def test_weights_over_a_gloo_group(http: httpx.AsyncClient) -> None:
    before = await generate(http)
    old, new = (tiny_model("qwen3", seed=s, max_position_embeddings=CONTEXT) for s in (0, 3))
    trainer = Trainer("contract")
    await post(http, "/init_weights_update_group", trainer.join_request())
    trainer.wait()

    async def update(state: dict[str, torch.Tensor], **body: Any) -> httpx.Response:
        request = {
            "names": list(state),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in state.values()],
            "shapes": [list(t.shape) for t in state.values()],
            "group_name": "contract",
            "flush_cache": True,
            **body,
        }
        sending = asyncio.to_thread(trainer.send, list(state.values()))
        reply, _ = await asyncio.gather(
            http.post("/update_weights_from_distributed", json=request), sending
        )
        return reply

    # A refused bucket is received all the same: the next one must find the group in step.
    refused = await update({"model.norm.weight": torch.ones(64), "nobody": torch.ones(3)})
    assert refused.status_code == 400
    assert "nobody" in refused.json()["message"]
    assert (await generate(http))["output_ids"] == before["output_ids"]

    loaded = await update(new.state_dict(), weight_version="12")
    sums = {name: checksum(tensor) for name, tensor in new.state_dict().items()}
    assert loaded.json()["checksums"] == sums
    after = await generate(http)
    assert after["meta_info"]["weight_version"] == "12"
    logits = new(input_ids=torch.tensor([PROMPT + after["output_ids"]])).logits[0]
    chosen = torch.tensor(after["output_ids"])[:, None]
    expected = torch.log_softmax(logits, -1)[3:-1].gather(1, chosen)[:, 0]
    got = [entry[0] for entry in after["meta_info"]["output_token_logprobs"]]
    assert got == pytest.approx(expected.tolist(), abs=1e-5)

    assert (await update(old.state_dict())).status_code == 200
    await post(http, "/destroy_weights_update_group", {"group_name": "contract"})
    again = await http.post("/destroy_weights_update_group", json={"group_name": "contract"})
    assert again.status_code == 400
    assert (await generate(http))["output_ids"] == before["output_ids"]


@ours_only
async def test_a_version_can_be_set_and_spans_are_told(http: httpx.AsyncClient) -> None:
    task = await long_request(http, rid="span")
    await post(http, "/update_weight_version", {"new_version": "20", "abort_all_requests": False})
    assert (await http.get("/get_weight_version")).json()["weight_version"] == "20"
    await post(http, "/abort_request", {"rid": "span"})
    meta = (await task)["meta_info"]
    assert meta["weight_version"] == "20"
    spans = meta["weight_versions"]
    assert spans[0][1] == 0
    assert spans[-1][0] == "20"


# --- memory and information ---


@ours_only
async def test_released_memory_refuses_generation_until_resumed(http: httpx.AsyncClient) -> None:
    busy = await long_request(http)
    assert (await http.post("/release_memory_occupation", json={})).status_code == 400
    await post(http, "/abort_request", {"abort_all": True})
    await busy
    before = await generate(http)
    await post(http, "/release_memory_occupation", {})
    refused = await http.post("/generate", json={"input_ids": PROMPT})
    assert refused.status_code == 503
    await post(http, "/resume_memory_occupation", {"tags": ["weights"]})
    assert (await http.post("/generate", json={"input_ids": PROMPT})).status_code == 503
    await post(http, "/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    assert (await generate(http))["output_ids"] == before["output_ids"]


@pytest.mark.parametrize(
    "path", ["/health", "/health_generate", "/model_info", "/server_info", "/v1/models"]
)
async def test_information_is_there(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200


@ours_only
async def test_information_says_what_this_is(http: httpx.AsyncClient) -> None:
    info = (await http.get("/server_info")).json()
    assert info["slime_engine"] == "embedded"
    assert info["batch_invariant"] in (True, False)
    assert info["max_running_requests"] == 16
    assert info == (await http.get("/get_server_info")).json()
    assert (await http.get("/get_model_info")).json()["is_generation"] is True
    assert (await http.get("/v1/models")).json()["data"][0]["id"] == "tiny"
    assert "version" in (await http.get("/version")).json()
    metrics = (await http.get("/metrics")).text
    for name in ("num_running_reqs", "num_queue_reqs", "gen_throughput"):
        assert f"sglang:{name}{{" in metrics


# --- the process ---


@ours_only
async def test_http2_probes_of_routers_leave_no_traceback(server: ServerProcess) -> None:
    host, port = server.spec.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    await writer.drain()
    await asyncio.wait_for(reader.read(), TIMEOUT_S)
    writer.close()
    assert "Traceback" not in server.spec.log_path.read_text()


@ours_only
def test_sigterm_ends_requests_and_the_process_cleanly(model_path: Path, tmp_path: Path) -> None:
    spec = engine_spec(model_path, tmp_path, "--api-key", "secret")
    with running(spec) as process, httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
        assert client.get(spec.url + "/server_info").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get(spec.url + "/server_info").status_code == 200
        replies: list[httpx.Response] = []
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": CONTEXT - 100}}
        body["sampling_params"]["ignore_eos"] = True  # type: ignore[index]
        thread = threading.Thread(
            target=lambda: replies.append(client.post(spec.url + "/generate", json=body))
        )
        thread.start()
        while client.get(spec.url + "/v1/loads").json()["loads"][0]["num_running_reqs"] == 0:
            assert process.is_alive()
        os.kill(process.pid, signal.SIGTERM)
        thread.join(TIMEOUT_S)
        assert [reply.status_code for reply in replies] == [503]
        assert process._process.wait(TIMEOUT_S) == 0
    assert "Traceback" not in process.log_tail()


@ours_only
def test_a_model_that_cannot_be_loaded_is_named_and_the_process_ends(tmp_path: Path) -> None:
    spec = engine_spec(tmp_path / "nothing", tmp_path)
    done = subprocess.run(spec.command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "no config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
