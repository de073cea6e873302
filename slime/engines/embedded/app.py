"""The embedded engine's HTTP application: routes, generation, streaming and information."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from slime.engines.embedded.answers import RequestMaker, answer
from slime.engines.embedded.args import ServerArgs
from slime.engines.embedded.control import Controller
from slime.engines.embedded.engine import EngineLoop
from slime.engines.embedded.info import EngineInfo, version
from slime.engines.embedded.requests import Request, RequestGroup
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.embedded.selfcheck import CheckedRunner
from slime.engines.embedded.web_json import (
    demand_key,
    errors_as_json,
    info_page,
    json_answer,
    posted,
    read_body,
)
from slime.engines.embedded.weights import ParameterStore
from slime.engines.protocol import (
    Endpoint,
    GenerateCall,
    Json,
    PromptRequest,
    SamplingParams,
)
from slime.errors import EngineError, EngineUnavailable

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 31
HEALTH_TIMEOUT_S = 20.0


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
        self._info = EngineInfo(args, checked, scheduler, maker.eos_ids)
        self._maker = maker
        self._scheduler = scheduler
        self.loop = EngineLoop(scheduler, self._deliver, self._end_process)
        self._control = Controller(self.loop, ParameterStore(checked.runner.model))
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[RequestGroup, asyncio.Future[None]] = {}
        self._streams: dict[RequestGroup, asyncio.Queue[Request]] = {}

    def build(self) -> web.Application:
        """The application; its engine thread starts and stops with it."""
        middlewares = [errors_as_json]
        if self._args.api_key is not None:
            middlewares.insert(0, demand_key(self._args.api_key))
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
            Endpoint.MODEL_INFO: self._info.model,
            Endpoint.GET_MODEL_INFO: self._info.model,
            Endpoint.SERVER_INFO: self._info.server,
            Endpoint.GET_SERVER_INFO: self._info.server,
            Endpoint.V1_LOADS: self._info.v1_loads,
            Endpoint.GET_LOADS: lambda: [self._info.load()],
            Endpoint.MODELS: self._info.models,
            Endpoint.VERSION: lambda: {"version": version()},
            Endpoint.GET_WEIGHT_VERSION: self._info.weight_version,
        }
        return [
            web.post(Endpoint.GENERATE, self._generate),
            web.get(Endpoint.HEALTH, self._health),
            web.get(Endpoint.HEALTH_GENERATE, self._health_generate),
            web.get(Endpoint.METRICS, self._metrics),
            web.get(Endpoint.FLUSH_CACHE, posted(control.flush_cache)),
            *(web.post(path, posted(handle)) for path, handle in posts.items()),
            *(web.get(path, info_page(handle)) for path, handle in infos.items()),
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
        call = GenerateCall.from_json(await read_body(http))
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
        return json_answer(answers if call.as_list else answers[0])

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

    # --- health ---

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
        text = self._info.metrics()
        return web.Response(text=text, content_type="text/plain", charset="utf-8")


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
