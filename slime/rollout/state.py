"""GenerateState: what the tasks of one configuration share while they generate."""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from slime.config.checkpoints import is_hf_folder, read_hf_config
from slime.data.chat import Tokenizer, load_tokenizer
from slime.data.versions import UNKNOWN, spans_of_answer
from slime.engines.client import EngineClient, trust_with_key
from slime.engines.protocol import PauseMode
from slime.errors import EngineError
from slime.observability.metrics import spread
from slime.observability.phases import Phase, side_by_side

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
REQUEST_TIMES = ("e2e_latency", "queue_time")
_NUMBERS = (int, float)


@dataclass
class Progress:
    """Counts of what this process generates now; one round or evaluation at a time.

    Attributes:
        target: groups the round needs; 0 between rounds.
        accepted, dropped: groups so far.
        running: samples on their way to an engine or back.
        tokens: written by the engines since the round began, in answers that have come.
    """

    rollout_id: int | None = None
    target: int = 0
    accepted: int = 0
    dropped: int = 0
    running: int = 0
    tokens: int = 0
    started: float = 0.0
    _sample_seconds: float = 0.0
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def begin(self, rollout_id: int, target: int) -> None:
        """A round begins."""
        self.rollout_id, self.target, self.started = rollout_id, target, time.monotonic()
        self.accepted = self.dropped = self.tokens = 0

    def end(self) -> None:
        """The round is over."""
        self.rollout_id, self.target = None, 0

    def run(self, num_samples: int) -> None:
        """So many more samples are running, or fewer."""
        with self._lock:
            self._count_seconds()
            self.running += num_samples

    def take_sample_seconds(self) -> float:
        """Seconds that samples have been running since the last call, each counted for itself."""
        with self._lock:
            self._count_seconds()
            seconds, self._sample_seconds = self._sample_seconds, 0.0
        return seconds

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self._sample_seconds += self.running * (now - self._since)
        self._since = now

    def counts(self) -> dict[str, float]:
        """By name, with the round's `seconds` so far; only `running` between rounds."""
        if self.rollout_id is None:
            return {"running": self.running}
        names = ("rollout_id", "target", "accepted", "dropped", "running", "tokens")
        counts: dict[str, float] = {name: getattr(self, name) for name in names}
        return counts | {"seconds": time.monotonic() - self.started}


progress = Progress()


class GenerateState:
    """Router client, concurrency limit and sampling parameters of one `args` object.

    `GenerateState(args)` gives the same state for the same `args`, so a custom generate function
    can ask for it at each call; another `args` (another model, another evaluation) has its own.

    Attributes:
        client: of the router.
        router_url: `http://host:port`.
        sampling_params: of a rollout, as `/generate` takes them; copy before changing.
        semaphore: samples in flight, `sglang_server_concurrency` per engine.
        pending: tasks of the running round, one per group.
        aborted: the round is full; send no more requests.
        rollout_id: number of the running round.
        failures: first error of each category in this round.
        weight_version: newest one that an answer named; None before the first.
        num_continued: requests of this round for the rest of an answer that an engine cut short.
        outlasts_rounds: what one call of the rollout function begins goes on in the next.
        num_wanted: samples that hold a place, or wait for one.
        on_free: called when one of them gives its place back.
        num_asking: requests of `generate` that are under way.
        processor: None: prompts with images are not built.
    """

    processor: ClassVar[None] = None

    _states: ClassVar[dict[int, "GenerateState"]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __new__(cls, args: Any) -> Self:
        """The state of `args`, made on first use and dropped with `args`."""
        with cls._lock:
            state = cls._states.get(id(args))
            if state is None:
                state = super().__new__(cls)
                state._set_up(args)
                cls._states[id(args)] = state
                # Keyed by identity, not stored on args: a copy of args is another configuration.
                weakref.finalize(args, cls._states.pop, id(args), None).atexit = False
            return state  # pyright: ignore[reportReturnType]

    def _set_up(self, args: Any) -> None:
        host = args.sglang_router_ip
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self.router_url = f"http://{host}:{args.sglang_router_port}"
        self.capacity = max(1, args.sglang_server_concurrency * max(1, args.num_engines))
        self.client = EngineClient(
            self.router_url, timeout_s=args.request_timeout_s, max_connections=self.capacity + 16
        )
        # A fact the rollout manager learns from the engines; absent where somebody else made args.
        self._engine_urls: Sequence[str] = vars(args).get("engine_urls", ())
        trust_with_key(*self._engine_urls)
        self.sampling_params = sampling_params(args)
        self.semaphore = asyncio.Semaphore(self.capacity)
        self.pending: set[asyncio.Task[Any]] = set()
        self.aborted = False
        self.rollout_id: int | None = None
        self.failures: dict[str, Exception] = {}
        self.weight_version: str | None = None
        self.num_continued = 0
        self.outlasts_rounds = False
        self.num_wanted = 0
        self.on_free: Callable[[], None] | None = None
        self.num_asking = 0
        self._gate = asyncio.Event()
        self._gate.set()
        self._pause_mode: str | None = args.update_weight_pause_mode
        self._lets_go_on = self._pause_mode in (PauseMode.RETRACT, PauseMode.IN_PLACE)
        self.eval_prompts: dict[str, Any] = {}
        self.request_times: dict[str, list[float]] = {name: [] for name in REQUEST_TIMES}
        self._many = asyncio.Lock()
        self._hf_checkpoint: str | None = args.hf_checkpoint
        self._context_length: int | None = vars(args).get("sglang_context_length")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of --hf-checkpoint, loaded when first asked for."""
        return load_tokenizer(self._hf_checkpoint)

    @cached_property
    def vocab_size(self) -> int | None:
        """Ids of the model of --hf-checkpoint are below it; None when its config.json is silent."""
        if self._hf_checkpoint is None or not is_hf_folder(self._hf_checkpoint):
            return None
        size = read_hf_config(self._hf_checkpoint).get("vocab_size")
        return size if isinstance(size, int) else None

    @cached_property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer: --sglang-context-length, or what the model's config says."""
        if self._context_length is not None:
            return self._context_length
        if self._hf_checkpoint is None or not is_hf_folder(self._hf_checkpoint):
            return None
        size = read_hf_config(self._hf_checkpoint).get("max_position_embeddings")
        return size if isinstance(size, int) else None

    @classmethod
    def start_round_of(cls, args: Any, rollout_id: int | None) -> None:
        """As `start_round`, for the state of `args` if there is one."""
        with cls._lock:
            state = cls._states.get(id(args))
        if state is not None and not state.outlasts_rounds:
            state.start_round(rollout_id)

    def start_round(self, rollout_id: int | None) -> None:
        """Forget the abort, the failures and the times of the round before."""
        self.rollout_id = rollout_id
        self.aborted = False
        self.failures.clear()
        self.num_continued = 0
        self.pending.clear()
        self.request_times = {name: [] for name in REQUEST_TIMES}

    @asynccontextmanager
    async def slots(self, num_samples: int) -> AsyncIterator[None]:
        """Hold `num_samples` places of the semaphore (at most all of them) for one request."""
        taken, wanted = 0, min(num_samples, self.capacity)
        self.num_wanted += num_samples
        try:
            # One collector at a time: two half-served ones would wait for each other forever.
            async with self._many:
                for _ in range(wanted):
                    await self.semaphore.acquire()
                    taken += 1
            progress.run(num_samples)
            try:
                with side_by_side(Phase.GENERATE):
                    yield
            finally:
                progress.run(-num_samples)
        finally:
            for _ in range(taken):
                self.semaphore.release()
            self.num_wanted -= num_samples
            if self.on_free is not None:
                self.on_free()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """One request of `generate` is under way inside; waits while `hold` keeps them back."""
        await self._gate.wait()
        self.num_asking += 1
        try:
            yield
        finally:
            self.num_asking -= 1

    def hold(self) -> None:
        """Let no further request of `generate` leave until `release`."""
        self._gate.clear()

    def release(self) -> None:
        """Let them go again."""
        self._gate.set()

    async def learn_version(self) -> None:
        """Ask an engine for its weight version, where answers alone may not tell who wrote what."""
        if not self._lets_go_on or not self._engine_urls:
            return
        url = f"{self._engine_urls[0]}/model_info"
        try:
            info: dict[str, Any] = await self.client.get(url, timeout_s=ASK_TIMEOUT_S)
        except EngineError as error:
            logger.warning("cannot learn the engines' weight version: %s", error)
        else:
            self.note_version(str(info.get("weight_version", UNKNOWN)))

    def with_versions(self, meta_info: dict[str, Any], sent_under: str | None) -> dict[str, Any]:
        """`meta_info` of an answer, with `weight_versions` where requests go on while weights change.

        Args:
            sent_under: `weight_version` of this state when the request left.
        """
        if not self._lets_go_on or "weight_versions" in meta_info:
            return meta_info
        spans = spans_of_answer(meta_info, pause_mode=self._pause_mode, sent_under=sent_under)
        return meta_info | {"weight_versions": [[version, first] for first, version in spans]}

    def note_version(self, version: str) -> None:
        """An engine has weights of this version, or had."""
        known = self.weight_version or ""
        # Answers are read in another order than they were written.
        if not (known.isdigit() and version.isdigit() and int(version) < int(known)):
            self.weight_version = version

    def record(self, meta_info: dict[str, Any]) -> None:
        """Keep the times an engine measured for one request."""
        progress.tokens += int(meta_info.get("completion_tokens") or 0)
        if (version := meta_info.get("weight_version")) is not None:
            self.note_version(str(version))
        for name in REQUEST_TIMES:
            if isinstance(value := meta_info.get(name), _NUMBERS):
                self.request_times[name].append(float(value))

    def take_request_metrics(self) -> dict[str, float]:
        """As `request_metrics`, since the last call."""
        metrics = self.request_metrics()
        self.num_continued = 0
        self.request_times = {name: [] for name in REQUEST_TIMES}
        return metrics

    def request_metrics(self) -> dict[str, float]:
        """`perf/request/{e2e_latency,queue_time}/{mean,median,max,min}` of this round, seconds; and
        `rollout/continued_answers`, where there were any."""
        times = {
            key: value
            for name, seconds in self.request_times.items()
            for key, value in spread(f"perf/request/{name}", seconds).items()
        }
        if not self.num_continued:
            return times
        return times | {"rollout/continued_answers": float(self.num_continued)}


def sampling_params(args: Any) -> dict[str, Any]:
    """Sampling parameters of a rollout as `/generate` names them; unset ones are left out."""
    params = {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        # Text and tokens must say the same: the stop string stays, no spaces are invented.
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    return {name: value for name, value in params.items() if value is not None}
