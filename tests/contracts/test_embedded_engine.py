"""The embedded engine's own ways, over HTTP on a real server process: what SGLang has not, or does otherwise.

What it shares with SGLang is in test_engine_protocol.py.
"""

import asyncio
import base64
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save
from support.engine_http import (
    CONTEXT,
    PROMPT,
    TIMEOUT_S,
    GlooTrainer,
    Json,
    generate,
    long_request,
    post,
)
from support.engine_server import engine_spec, running
from support.tiny_models import save_tiny_model, tiny_model

from slime.engines.checksum import checksum
from slime.engines.servers import ServerProcess


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


@pytest.fixture
async def http(server: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=server.spec.url, timeout=TIMEOUT_S, trust_env=False
    ) as client:
        yield client


# --- generation ---


async def test_each_answer_of_a_group_can_have_its_own_seed(http: httpx.AsyncClient) -> None:
    group = await generate(http, {"n": 3, "ignore_eos": True}, sampling_seeds=[4, 5, 6])
    singles = [await generate(http, {"ignore_eos": True, "sampling_seed": s}) for s in (4, 5, 6)]
    assert [a["output_ids"] for a in group] == [a["output_ids"] for a in singles]
    assert [a["meta_info"]["output_token_logprobs"] for a in group] == [
        a["meta_info"]["output_token_logprobs"] for a in singles
    ]


async def test_unknown_parameters_are_named(http: httpx.AsyncClient) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_token": 3}}
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 400
    assert "max_token" in reply.text
    assert (await http.post("/generate", content=b"{")).status_code == 400


async def test_an_id_outside_the_vocabulary_is_refused(http: httpx.AsyncClient) -> None:
    """It ends a stock SGLang server."""
    reply = await http.post("/generate", json={"input_ids": [5, 1000]})
    assert reply.status_code == 400
    assert "1000" in reply.json()["error"]["message"]


# --- abort, pause ---


async def test_an_abort_ends_requests_by_the_beginning_of_their_id(
    http: httpx.AsyncClient,
) -> None:
    """Also while they are paused; SGLang wants the whole id, and answers after the pause."""
    task = await long_request(http, rid="round-7-sample-1")
    await post(http, "/pause_generation", {"mode": "in_place"})
    await post(http, "/abort_request", {"rid": "round-7"})
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    await post(http, "/continue_generation")
    assert (await http.post("/abort_request", json={})).status_code == 400


async def test_an_engine_is_healthy_while_it_is_paused(http: httpx.AsyncClient) -> None:
    """SGLang answers 503 after 20 seconds."""
    await post(http, "/pause_generation", {"mode": "in_place"})
    statuses = [(await http.get(path)).status_code for path in ("/health", "/health_generate")]
    await post(http, "/continue_generation")
    assert statuses == [200, 200]


# --- weights ---


async def test_weights_from_disk_come_back_as_checksums(
    http: httpx.AsyncClient, model_path: Path
) -> None:
    answer = await post(http, "/update_weights_from_disk", {"model_path": str(model_path)})
    state = tiny_model("qwen3", max_position_embeddings=CONTEXT).state_dict()
    assert answer["checksums"] == {name: checksum(tensor) for name, tensor in state.items()}


async def test_an_update_may_flush_while_requests_are_paused(http: httpx.AsyncClient) -> None:
    """And loads between two steps while they run, where SGLang waits for all to end."""
    state = tiny_model("qwen3", max_position_embeddings=CONTEXT).state_dict()
    part = base64.b64encode(save({"model.norm.weight": state["model.norm.weight"]})).decode()
    body = {"serialized_named_tensors": [part], "load_format": "safetensors"}
    task = await long_request(http, rid="flushed")
    await post(http, "/update_weights_from_tensor", {**body, "flush_cache": True})
    await post(http, "/pause_generation", {"mode": "retract"})
    await post(http, "/update_weights_from_tensor", {**body, "flush_cache": True})
    await post(http, "/continue_generation")
    await post(http, "/abort_request", {"rid": "flushed"})
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_weights_in_a_request_and_refusals(http: httpx.AsyncClient) -> None:
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


async def test_a_refused_bucket_is_received_and_checksums_come_back(
    http: httpx.AsyncClient,
) -> None:
    before = await generate(http)
    state = tiny_model("qwen3", max_position_embeddings=CONTEXT).state_dict()
    trainer = GlooTrainer("checksums", ("checksums",))
    await post(http, "/init_weights_update_group", trainer.join_request())
    trainer.wait()
    # A refused bucket is received all the same: the next one must find the group in step.
    refused = await trainer.update(
        http, {"model.norm.weight": torch.ones(64), "nobody": torch.ones(3)}
    )
    assert refused.status_code == 400
    assert "nobody" in refused.json()["message"]
    assert (await generate(http))["output_ids"] == before["output_ids"]
    loaded = await trainer.update(http, state)
    assert loaded.json()["checksums"] == {name: checksum(t) for name, t in state.items()}
    await post(http, "/destroy_weights_update_group", {"group_name": "checksums"})


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


async def test_http2_probes_of_routers_leave_no_traceback(server: ServerProcess) -> None:
    host, port = server.spec.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    await writer.drain()
    await asyncio.wait_for(reader.read(), TIMEOUT_S)
    writer.close()
    assert "Traceback" not in server.spec.log_path.read_text()


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


def test_a_model_that_cannot_be_loaded_is_named_and_the_process_ends(tmp_path: Path) -> None:
    spec = engine_spec(tmp_path / "nothing", tmp_path)
    done = subprocess.run(spec.command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "no config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
