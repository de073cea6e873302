"""The embedded engine's HTTP application: routes, generation, streaming and information."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import orjson
from aiohttp import web

from slime.engines.embedded.answers import RequestMaker, answer
from slime.engines.embedded.args import ServerArgs
from slime.engines.embedded.control import Controller
from slime.engines.embedded.engine import EngineLoop
from slime.engines.embedded.requests import Request, RequestGroup
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.embedded.selfcheck import CheckedRunner
from slime.engines.embedded.stats import prometheus_text
from slime.engines.embedded.weights import ParameterStore
from slime.engines.protocol import (
    Endpoint,
    GenerateCall,
    Json,
    PromptRequest,
    SamplingParams,
    error_answer,
    update_answer,
)
from slime.errors import (
    CheckpointError,
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    WeightSyncError,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 31
HEALTH_TIMEOUT_S = 20.0
# As in SGLang: probes and Prometheus carry no key.
_OPEN_PATHS = frozenset({Endpoint.HEALTH, Endpoint.HEALTH_GENERATE, Endpoint.METRICS})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EngineApp:
    """One engine behind HTTP.

    Args:
        args: the server's options.
        checked: the model, past its self-check.
        maker: turns prompts into requests.
        scheduler: not started yet; the engine thread becomes its owner.
    """

    def __init__(
        self, args: ServerArgs, checked: CheckedRunner, maker: RequestMaker, scheduler: Scheduler
    ) -> None:
        self._args = args
        self._checked = checked
        self._maker = maker
        self._scheduler = scheduler
        self.loop = EngineLoop(scheduler, self._deliver, self._end_process)
        self._control = Controller(self.loop, ParameterStore(checked.runner.model))
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[RequestGroup, asyncio.Future[None]] = {}
        self._streams: dict[RequestGroup, asyncio.Queue[Request]] = {}

    def build(self) -> web.Application:
        """The application; its engine thread starts and stops with it."""
        middlewares = [_errors_as_json]
        if self._args.api_key is not None:
            middlewares.insert(0, _demand_key(self._args.api_key))
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.add_routes(self._routes())
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)
        return app

    def _routes(self) -> list[web.RouteDef]:
        control = self._control
        posts: dict[Endpoint, Callable[[Json], Awaitable[Json]]] = {
            Endpoint.ABORT: control.abort,
            Endpoint.PAUSE: control.pause,
            Endpoint.CONTINUE: control.resume,
            Endpoint.FLUSH_CACHE: control.flush_cache,
            Endpoint.RELEASE_MEMORY: control.release_memory,
            Endpoint.RESUME_MEMORY: control.resume_memory,
            Endpoint.INIT_WEIGHTS_GROUP: control.init_group,
            Endpoint.DESTROY_WEIGHTS_GROUP: control.destroy_group,
            Endpoint.UPDATE_FROM_DISTRIBUTED: control.update_from_distributed,
            Endpoint.UPDATE_FROM_TENSOR: control.update_from_tensor,
            Endpoint.UPDATE_FROM_DISK: control.update_from_disk,
            Endpoint.UPDATE_WEIGHT_VERSION: control.update_version,
        }
        infos: dict[Endpoint, Callable[[], Any]] = {
            Endpoint.MODEL_INFO: self._model_info,
            Endpoint.GET_MODEL_INFO: self._model_info,
            Endpoint.SERVER_INFO: self._server_info,
            Endpoint.GET_SERVER_INFO: self._server_info,
            Endpoint.V1_LOADS: self._v1_loads,
            Endpoint.GET_LOADS: lambda: [self._load()],
            Endpoint.MODELS: self._models,
            Endpoint.VERSION: lambda: {"version": _version()},
            Endpoint.GET_WEIGHT_VERSION: self._weight_version,
        }
        return [
            web.post(Endpoint.GENERATE, self._generate),
            web.get(Endpoint.HEALTH, self._health),
            web.get(Endpoint.HEALTH_GENERATE, self._health_generate),
            web.get(Endpoint.METRICS, self._metrics),
            web.get(Endpoint.FLUSH_CACHE, _posted(control.flush_cache)),
            *(web.post(path, _posted(handle)) for path, handle in posts.items()),
            *(web.get(path, _info(handle)) for path, handle in infos.items()),
        ]

    # --- life ---

    async def _start(self, _: web.Application) -> None:
        self._asyncio = asyncio.get_running_loop()
        self.loop.start()

    async def _stop(self, _: web.Application) -> None:
        """End all requests with what they have, so that their clients get an answer."""
        await asyncio.to_thread(self.loop.stop)

    def _deliver(self, groups: list[RequestGroup], progress: list[Request]) -> None:
        """On the engine thread: one hop to the HTTP thread for a whole step."""
        assert self._asyncio is not None
        with contextlib.suppress(RuntimeError):  # the HTTP loop is closed: nobody waits any more
            self._asyncio.call_soon_threadsafe(self._resolve, groups, progress)

    def _end_process(self) -> None:
        """On the engine thread, after it failed: nothing here can serve again."""
        assert self._asyncio is not None
        self._asyncio.call_soon_threadsafe(_exit)

    def _resolve(self, groups: list[RequestGroup], progress: list[Request]) -> None:
        for request in progress:
            queue = None if request.group is None else self._streams.get(request.group)
            if queue is not None:
                queue.put_nowait(request)
        for group in groups:
            future = self._waiting.get(group)
            if future is not None and not future.done():
                future.set_result(None)

    # --- generation ---

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        call = GenerateCall.from_json(await _body(http))
        if self._control.released:
            raise EngineUnavailable(
                f"memory is released ({', '.join(sorted(self._control.released))}); call "
                f"{Endpoint.RESUME_MEMORY} first"
            )
        group = RequestGroup(tuple(self._maker.requests(call)))
        if call.stream:
            return await self._stream(http, call, group)
        await self._run(group)
        _raise_server_errors(group)
        answers = [answer(request, self._maker.detokenizer) for request in group.requests]
        return _json(answers if call.as_list else answers[0])

    async def _run(self, group: RequestGroup) -> None:
        """Return once every request of the group has ended; a client that goes away ends them."""
        future = self._waiting[group] = asyncio.get_running_loop().create_future()
        try:
            self.loop.submit(group.requests)
            await future
        except asyncio.CancelledError:
            self._abandon(group)
            raise
        finally:
            del self._waiting[group]

    async def _stream(
        self, http: web.Request, call: GenerateCall, group: RequestGroup
    ) -> web.StreamResponse:
        """Server-sent events: the answer so far after each token, then [DONE]."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        queue = self._streams[group] = asyncio.Queue()
        index = {request: i for i, request in enumerate(group.requests)}
        open_requests = set(group.requests)
        try:
            self.loop.submit(group.requests)
            while open_requests:
                request = await queue.get()
                if request not in open_requests:
                    continue
                if request.finish is not None:
                    open_requests.remove(request)
                part = answer(request, self._maker.detokenizer)
                if call.as_list:
                    part["index"] = index[request]
                await response.write(b"data: " + orjson.dumps(part) + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self._abandon(group)
            raise
        finally:
            del self._streams[group]
        return response

    def _abandon(self, group: RequestGroup) -> None:
        """Free the slots of requests whose client is gone."""
        with contextlib.suppress(EngineUnavailable):
            self.loop.call(lambda s: s.abort(lambda r: r.group is group, "the client went away"))

    # --- information ---

    async def _health(self, _: web.Request) -> web.Response:
        if self.loop.failure is not None:
            raise EngineUnavailable(f"the engine has stopped: {self.loop.failure}")
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        """200 once the engine thread answers; with a token of its own when nothing else runs."""
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            is_idle = await asyncio.wrap_future(self.loop.call(lambda s: s.is_idle))
            if is_idle and not self._scheduler.is_paused and not self._control.released:
                params = SamplingParams(max_new_tokens=1, top_k=1, ignore_eos=True)
                prompt = PromptRequest(
                    rid=None, input_ids=(0,), text=None, params=params, seeds=(0,),
                    return_logprob=False, logprob_start_len=-1,
                )  # fmt: skip
                call = GenerateCall(prompts=(prompt,), as_list=False, stream=False)
                await self._run(RequestGroup(tuple(self._maker.requests(call))))
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        load = self._load()
        gauges = {
            "num_running_reqs": load["num_running_reqs"],
            "num_queue_reqs": load["num_waiting_reqs"],
            "num_used_tokens": load["num_used_tokens"],
            "max_running_requests": load["max_running_requests"],
            "token_usage": load["token_usage"],
            "gen_throughput": load["gen_throughput"],
        }
        text = prometheus_text(gauges, self._scheduler.stats, self._args.model_name)
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    def _load(self) -> Json:
        """How busy the engine is; read without waiting for it, so a step behind at worst."""
        scheduler = self._scheduler
        running, waiting = scheduler.table.active, len(scheduler.waiting)
        used = int(scheduler.table.lengths[:running].sum())
        capacity = scheduler.limits.max_running * scheduler.runner.context_length
        return {
            "dp_rank": 0,
            "num_reqs": running + waiting,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_tokens": used,
            "num_used_tokens": used,
            "max_total_num_tokens": capacity,
            "max_running_requests": scheduler.limits.max_running,
            "token_usage": used / capacity,
            "gen_throughput": scheduler.stats.throughput,
            "cache_hit_rate": 0.0,
            "utilization": running / scheduler.limits.max_running,
        }

    def _v1_loads(self) -> Json:
        load = self._load()
        aggregate = {
            "total_running_reqs": load["num_running_reqs"],
            "total_waiting_reqs": load["num_waiting_reqs"],
            "total_reqs": load["num_total_reqs"],
        }
        return {"version": _version(), "dp_rank_count": 1, "loads": [load], "aggregate": aggregate}

    def _model_info(self) -> Json:
        config = self._checked.runner.config
        return {
            "model_path": self._args.model_path,
            "tokenizer_path": self._args.tokenizer_path or self._args.model_path,
            "served_model_name": self._args.model_name,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": self._scheduler.weight_version,
            "model_type": config.model_type,
            "architectures": self._checked.runner.model.config.architectures,
            "vocab_size": self._checked.runner.vocab_size,
            "max_context_length": self._checked.runner.context_length,
            "max_model_len": self._checked.runner.context_length,
            "eos_token_ids": list(self._maker.eos_ids),
        }

    def _server_info(self) -> Json:
        checked, args = self._checked, self._args
        return {
            **self._model_info(),
            "slime_engine": "embedded",
            "version": _version(),
            "status": "ready",
            "host": args.host,
            "port": args.port,
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "dtype": args.dtype,
            "random_seed": args.random_seed,
            "context_length": checked.runner.context_length,
            "max_running_requests": args.max_running_requests,
            "max_prefill_tokens": args.max_prefill_tokens,
            "attention_backend": checked.runner.attention,
            "self_check_difference": checked.difference,
            "batch_invariant": checked.is_invariant,
            "enable_deterministic_inference": args.enable_deterministic_inference,
            "num_threads": args.num_threads,
        }

    def _models(self) -> Json:
        card = {
            "id": self._args.model_name,
            "object": "model",
            "owned_by": "slime",
            "root": self._args.model_path,
            "max_model_len": self._checked.runner.context_length,
        }
        return {"object": "list", "data": [card]}

    def _weight_version(self) -> Json:
        return {"weight_version": self._scheduler.weight_version}


def _exit() -> None:
    raise web.GracefulExit


def _raise_server_errors(group: RequestGroup) -> None:
    """Answer with an error status what the engine ended for a fault of its own, as SGLang does."""
    for request in group.requests:
        status = (request.finish or {}).get("status_code")
        if status == 503:
            raise EngineUnavailable(str((request.finish or {}).get("message")))
        if status is not None:
            raise EngineError(str((request.finish or {}).get("message")))


def _version() -> str:
    try:
        return metadata.version("slime")
    except metadata.PackageNotFoundError:
        return "0.0.0"


async def _body(http: web.Request) -> Any:
    raw = await http.read()
    try:
        return orjson.loads(raw) if raw.strip() else {}
    except orjson.JSONDecodeError as error:
        raise EngineProtocolError(f"the body of {http.path} is no JSON: {error}") from error


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def _posted(handle: Callable[[Json], Awaitable[Json]]) -> Handler:
    async def handler(http: web.Request) -> web.Response:
        content = await handle(await _body(http))
        return _json(content, 400 if content.get("success") is False else 200)

    return handler


def _info(handle: Callable[[], Any]) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return _json(handle())

    return handler


def _demand_key(api_key: str) -> Any:
    """Middleware that lets nobody in without the key, except to see whether the engine lives."""
    expected = f"Bearer {api_key}"

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if request.path not in _OPEN_PATHS and not hmac.compare_digest(given, expected):
            return _json(error_answer("wrong or missing API key", "Unauthorized"), 401)
        return await handler(request)

    return check


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors a caller can act on, with their status; anything else stays a 500 with a traceback."""
    try:
        return await handler(request)
    except (CheckpointError, WeightSyncError) as error:
        logger.error("%s: %s", request.path, error)
        return _json(update_answer(False, str(error)), 400)
    except EngineProtocolError as error:
        logger.warning("%s refused: %s", request.path, error)
        return _json(error_answer(str(error), "BadRequestError"), 400)
    except (EngineUnavailable, TimeoutError) as error:
        return _json(error_answer(str(error) or "timeout", "ServiceUnavailable"), 503)
    except EngineError as error:
        logger.error("%s: %s", request.path, error)
        return _json(error_answer(str(error), "InternalServerError"), 500)
