"""Requests to an engine over HTTP, as the suites of the engine protocol send them."""

import asyncio
import datetime
import threading
from collections.abc import Callable
from typing import Any

import httpx
import torch
import torch.distributed as dist

from slime.engines.ports import hold_port

CONTEXT = 4096
TIMEOUT_S = 60.0
# Greedy answers of `tiny_model("qwen3")` to it do not repeat, and no choice is close.
PROMPT = [11, 3, 28, 29]
# For answers that are compared: greedy, to a given length.
GREEDY = {"temperature": 0, "ignore_eos": True}

Json = dict[str, Any]


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


def is_idle(load: Json) -> bool:
    return load["num_running_reqs"] + load["num_waiting_reqs"] == 0


async def long_request(
    http: httpx.AsyncClient, running: int = 1, **body: Any
) -> "asyncio.Task[Any]":
    """A request that runs for a while; by now it is the `running`-th that does."""
    params = {"max_new_tokens": CONTEXT - 100, "ignore_eos": True}
    task = asyncio.create_task(generate(http, params, **body))
    await until(http, lambda load: load["num_running_reqs"] >= running)
    return task


def log_probs(answer: Json) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def ids_beside_log_probs(answer: Json) -> list[int]:
    return [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]]


def expected_log_probs(
    model: Any, prompt: list[int], response: list[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of the response by one pass of the model over the whole of it."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    chosen = torch.tensor(response)[:, None]
    scores = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return scores.gather(1, chosen)[:, 0].tolist()


class GlooTrainer:
    """Rank 0 of a gloo group of two, as the protocol describes it.

    Args:
        name: of the group, on both sides.
        prefixes: under which the engine looks for the group in the store, the outermost first.
    """

    def __init__(self, name: str, prefixes: tuple[str, ...]) -> None:
        self.name, self.prefixes, self.port = name, prefixes, hold_port()
        self.group: Any = None
        self._thread = threading.Thread(target=self._connect)
        self._thread.start()

    def _connect(self) -> None:
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        store: Any = dist.TCPStore(
            "127.0.0.1", self.port, 2, is_master=True, timeout=timeout, wait_for_workers=False
        )
        for prefix in self.prefixes:
            store = dist.PrefixStore(prefix, store)
        self.group = dist.ProcessGroupGloo(store, 0, 2, timeout)

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

    async def update(
        self, http: httpx.AsyncClient, state: dict[str, torch.Tensor], **body: Any
    ) -> httpx.Response:
        """Send tensors, one by one or as one bucket as `load_format` says; the engine's reply."""
        request = {
            "names": list(state),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in state.values()],
            "shapes": [list(t.shape) for t in state.values()],
            "group_name": self.name,
            "flush_cache": True,
            **body,
        }
        parts = list(state.values())
        if body.get("load_format") == "flattened_bucket":
            parts = [torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in parts])]
        reply, _ = await asyncio.gather(
            http.post("/update_weights_from_distributed", json=request),
            asyncio.to_thread(self._send, parts),
        )
        return reply

    def _send(self, tensors: list[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for tensor in tensors:
            self.group.broadcast([tensor.contiguous().view(-1)], options).wait()
