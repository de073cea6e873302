"""A fake SGLang server for weight syncs: runs our receiver, in a process for each rank, as SGLang does."""

import base64
import io
import json
import multiprocessing
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from slime.engines.sglang.invitation import RECEIVER
from slime.engines.sglang.receiver import receive


class FakeModel(torch.nn.Module):
    """Holds parameters under the names they come by."""

    def __init__(self, weights: dict[str, Tensor], fails_at: str | None = None) -> None:
        super().__init__()
        self._fails_at = fails_at
        self._names = {name.replace(".", "_"): name for name in weights}
        for key, name in self._names.items():
            self.register_parameter(key, torch.nn.Parameter(weights[name].clone(), False))

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """As SGLang's models have it."""
        for name, tensor in weights:
            if name == self._fails_at:
                raise KeyError(name)
            self.get_parameter(name.replace(".", "_")).data.copy_(tensor)

    def names(self) -> list[str]:
        """Of its parameters, as they came."""
        return list(self._names.values())

    def weight(self, name: str) -> Tensor:
        """The parameter of that name."""
        return self.get_parameter(name.replace(".", "_"))


class OnlyTensors(pickle.Unpickler):
    """SGLang's own reader allows torch's names; ours need one of them."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) == ("torch", "Tensor"), f"{module}.{name}"
        return super().find_class(module, name)


class RankProcess:
    """A rank's own process, for one model after the other; gloo cannot have two members in one."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve_rank, args=(other,), daemon=True)
        self._process.start()

    def call(self, method: str, *args: Any) -> Any:
        """What the rank answers."""
        self._pipe.send((method, args))
        return self._pipe.recv()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve_rank(pipe: Any) -> None:
    model = FakeModel({})
    while True:
        method, args = pipe.recv()
        if method == "begin":
            arrays, *rest = args
            model = FakeModel({name: _unpacked(x) for name, x in arrays.items()}, *rest)
            pipe.send(None)
        elif method == "take":
            receive(model, OnlyTensors(io.BytesIO(args[0])).load())
            pipe.send(None)
        elif method == "load":
            folder, damages = args
            for file in sorted(Path(folder).glob("*.safetensors")):
                tensors = load_file(file)
                if damages in tensors:
                    tensors[damages] += 1
                model.load_weights(list(tensors.items()))
            pipe.send(None)
        else:
            pipe.send({name: packed(model.weight(name).data) for name in model.names()})


def packed(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """(dtype, shape, bytes): numpy has not all dtypes, and a pipe would share torch's memory."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data


def _unpacked(words: tuple[str, list[int], bytes]) -> Tensor:
    dtype, shape, data = words
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)


class FakeSGLang:
    """One server.

    Attributes:
        ranks: its tensor-parallel ranks.
        version: of its weights.
        paths: of all POST requests.
        flushes: what weight updates said of the cache.
        breaks: answer weight updates with an error and run no receiver.
        random_seed: as it was started with.
        loaders: its --custom-weight-loader.
        damages: name of a tensor that it takes from files with other values.
    """

    def __init__(self, *ranks: RankProcess, breaks: bool = False, random_seed: int = 0) -> None:
        self.ranks = ranks
        self.random_seed = random_seed
        self.version = "default"
        self.paths: list[str] = []
        self.flushes: list[bool] = []
        self.breaks = breaks
        self.loaders = [RECEIVER]
        self.damages: str | None = None
        self.url = ""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content for a POST request."""
        self.paths.append(path)
        if self.breaks and path.startswith("/update_weights_from"):
            return 500, {"error": "the scheduler is gone"}
        if path == "/update_weights_from_disk":
            for rank in self.ranks:
                rank.call("load", body["model_path"], self.damages)
        if path == "/update_weights_from_tensor":
            assert body["load_format"] == RECEIVER
            self.flushes.append(body["flush_cache"])
            payloads = [base64.b64decode(p) for p in body["serialized_named_tensors"]]
            with ThreadPoolExecutor(len(self.ranks)) as pool:
                calls = [
                    pool.submit(rank.call, "take", payload)
                    for rank, payload in zip(self.ranks, payloads, strict=True)
                ]
            assert [call.result() for call in calls] == [None] * len(self.ranks)
            return 200, {"success": True, "message": "Success"}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            assert body["abort_all_requests"] is False
        return 200, {"success": True}


@contextmanager
def serving(engine: FakeSGLang) -> Iterator[FakeSGLang]:
    """The server at a port of its own while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(
                200,
                {
                    "tp_size": len(engine.ranks),
                    "random_seed": engine.random_seed,
                    "custom_weight_loader": engine.loaders,
                    "loads": [],
                },
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            self._send(*engine.answer(self.path, body))

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()


class Engines:
    """Fake servers over a few rank processes, which take seconds to start."""

    def __init__(self) -> None:
        self._ranks = [RankProcess() for _ in range(3)]

    def make(self, *models: list[tuple[Any, ...]], breaks: bool = False) -> list[FakeSGLang]:
        """A server for each list; a model for each of its ranks, as the words of FakeModel."""
        ranks = iter(self._ranks)
        servers: list[FakeSGLang] = []
        for words in models:
            own = [next(ranks) for _ in words]
            for rank, model in zip(own, words, strict=True):
                tensors, *rest = model
                rank.call("begin", {name: packed(t) for name, t in tensors.items()}, *rest)
            servers.append(FakeSGLang(*own, breaks=breaks, random_seed=len(servers)))
        return servers

    def end(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.end()


def assert_holds(engines: Sequence[FakeSGLang], content: dict[str, Tensor]) -> None:
    """Every rank of the engines has these weights and no others, bit for bit."""
    for one in engines:
        for rank in one.ranks:
            held = rank.call("weights")
            assert held.keys() == content.keys()
            for name, tensor in content.items():
                assert held[name] == packed(tensor), name
