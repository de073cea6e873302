"""Stream: groups are generated all the time, and handed out a round at a time.

One task begins groups as far as `admission.py` allows and the engines have places. Whatever ends is
whole, dropped by the filter, or goes on. A round takes the oldest whole groups; it waits where what is
unfinished would grow too old. All of it happens on the process's event loop.
"""

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from slime.data.data_source import DataSource
from slime.data.sample import Sample
from slime.errors import DataError, DeadlineExceeded, EngineError
from slime.observability.doctor import late_report
from slime.observability.phases import Phase, phase, side_by_side
from slime.plugins import load_function
from slime.rollout import loop
from slime.rollout.admission import Bound
from slime.rollout.base_types import (
    Execution,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    flatten,
)
from slime.rollout.books import Books, Running, Whole
from slime.rollout.continuing import can_go_on, settle
from slime.rollout.evaluate import eval_rollout
from slime.rollout.filter_hub.base_types import call_dynamic_filter
from slime.rollout.groups import (
    generate_and_rm_group,
    is_unfinished,
    raise_if_all_failed,
    snapshot,
)
from slime.rollout.sglang_rollout import (
    ABORT_TIMEOUT_S,
    FIRST_ABORT_INTERVAL_S,
    MAX_ABORT_INTERVAL_S,
    MAX_EARLY_ABORTS,
    abort_engines,
    group_index,
    prompt_order,
)
from slime.rollout.state import GenerateState, progress
from slime.rollout.unfinished import Unfinished, oldest_weights, renewed, save_unfinished

logger = logging.getLogger(__name__)

Status = Sample.Status
Group = list[Execution]

# Groups asked of the data source at once.
MAX_CHUNK = 16
# Names the random numbers: those of a sample depend on its own number alone, not on a round.
SEED_STREAM = "fully-async"
# Looks at whether the engines have let go, between two calls to do so.
LOOKS = 20


class Stream:
    """What is generated for one `args` object.

    Attributes:
        books: where each group is.
        saves_next: the next round writes the state as it leaves.
        eval_args: of evaluations, which so have books, seeds and places of their own.
    """

    _streams: ClassVar[dict[int, "Stream"]] = {}

    @classmethod
    def of(cls, args: Any) -> "Stream":
        """The stream of `args`, made on first use; it lasts until `close`."""
        stream = cls._streams.get(id(args))
        if stream is None:
            stream = cls._streams.setdefault(id(args), cls(args))
        return stream

    def __init__(self, args: Any) -> None:
        self._args = args
        self.eval_args = copy.copy(args)
        self.saves_next = False
        self.books = Books(
            Bound(args.rollout_batch_size, args.max_weight_staleness, args.num_rollout or 0)
        )
        self._state = GenerateState(args)
        self._state.outlasts_rounds = True
        self._data_source: DataSource | None = None
        path = args.dynamic_sampling_filter_path
        self._filter = load_function(path) if path else None
        self._pump: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._finished: list[Group] = []
        self._all_failed: list[Group] = []
        self._num_early = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        # Held while groups are taken from the data source, and while a round is handed out.
        self._account = asyncio.Lock()
        # Held by an evaluation, and while requests are cut for a checkpoint.
        self._engines = asyncio.Lock()

    async def close(self) -> None:
        """End everything that is on its way."""
        self._streams.pop(id(self._args), None)
        pumps = [] if self._pump is None else [self._pump]
        await loop.cancel([*pumps, *self.books.running])

    # --- what the rollout manager tells ---

    def set_num_rollout(self, num_rollout: int) -> None:
        """Rounds of the run."""
        bound = self.books.bound
        self.books.bound = Bound(bound.batch, bound.max_staleness, num_rollout)

    async def note_weights(self, trained_rounds: int) -> None:
        """The engines have the weights after so many rounds."""
        self.books.weights = trained_rounds
        self._state.note_version(str(trained_rounds + 1))
        self._wake.set()

    def restore(self, groups: Sequence[Unfinished]) -> None:
        """Begin with these groups."""
        self.books.restore(groups)

    # --- rounds and evaluations ---

    async def evaluate(self, rollout_id: int) -> RolloutFnEvalOutput:
        """One evaluation; groups go on being generated beside it."""
        async with self._engines:
            return await eval_rollout(self.eval_args, rollout_id)

    async def next_round(self, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
        """The groups of round `rollout_id`, in the order of their prompts.

        Raises: as `generate_rollout_fully_async`.
        """
        started, books = time.monotonic(), self.books
        saves, self.saves_next = self.saves_next, False
        self._begin(rollout_id, data_source)
        progress.begin(rollout_id, books.bound.batch)
        limit = asyncio.timeout(self._args.rollout_timeout_s)
        try:
            async with limit:
                await self._until_full(rollout_id)
                async with self._still(saves), self._account:
                    output, unfinished = self._hand_out(rollout_id, data_source, saves)
                    if saves:
                        await self._save(rollout_id, data_source, unfinished)
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = await asyncio.to_thread(late_report, self._late_message(rollout_id))
            raise DeadlineExceeded(message) from error
        finally:
            progress.end()
        self._wake.set()
        logger.info(
            "rollout %d: %d groups after %.1f s (%d whole ones and %d on their way stay)",
            rollout_id,
            len(output.samples),
            time.monotonic() - started,
            len(books.whole),
            len(books.running) + len(books.again),
        )
        return output

    def _begin(self, rollout_id: int, data_source: DataSource) -> None:
        self.books.next_round = self._state.rollout_id = rollout_id
        if self._args.debug_rollout_only:  # nothing trains: whatever the engines have is new
            self.books.weights = rollout_id
        self.books.renew_old()
        if self._pump is None:
            self._data_source = data_source
            self.books.open(data_source)
            self._state.on_free = self._wake.set
            self._pump = asyncio.create_task(self._pump_groups(), name="fully asynchronous rollout")
        self._wake.set()

    async def _until_full(self, rollout_id: int) -> None:
        """Return once a round can be handed out."""
        books = self.books
        while True:
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            books.use_reserve()
            self._check_progress()
            progress.accepted = min(len(books.whole), books.bound.batch)
            progress.dropped = sum(map(len, books.drops.values()))
            if books.is_full(rollout_id):
                return
            await self._changed.wait()

    def _hand_out(
        self, rollout_id: int, data_source: DataSource, saves: bool
    ) -> tuple[RolloutFnTrainOutput, list[Unfinished]]:
        """The round, and what stays if that is to be saved; all of one moment."""
        args, books = self._args, self.books
        for task in [task for task in books.running if task.done()]:
            self._collect(task)
        chosen = books.take_round(rollout_id)
        unfinished = books.frozen(self._is_plain, group_rm=args.group_rm) if saves else []
        groups = sorted((item.group for item in chosen), key=prompt_order)
        metrics = books.metrics(rollout_id, chosen) | self._state.take_request_metrics()
        fates = books.take_fates(data_source)
        self._num_early = 0
        if not self._all_failed:
            self._state.failures.clear()
        finished, self._finished = self._finished, []
        if path := args.rollout_sample_filter_path:
            load_function(path)(args, groups)
        if path := args.rollout_all_samples_process_path:
            load_function(path)(args, sorted(finished, key=prompt_order), data_source)
        return RolloutFnTrainOutput(samples=groups, metrics=metrics, fates=fates), unfinished

    # --- beginning groups, and what becomes of them ---

    async def _pump_groups(self) -> None:
        try:
            while True:
                self._wake.clear()
                async with self._account:
                    await self._fill()
                await self._wake.wait()
        except Exception as error:  # noqa: BLE001 - the next round raises it
            self._failure = error
            self._changed.set()

    async def _fill(self) -> None:
        """Begin groups while they may be and the engines have places."""
        books, size = self.books, self._args.n_samples_per_prompt
        while (places := self._state.capacity - self._state.num_wanted) > 0:
            if books.again:
                self._submit(*books.again.popleft())
                continue
            if (room := books.room()) == 0:
                return
            count = min(room, MAX_CHUNK, -(-places // size))
            assert self._data_source is not None
            with side_by_side(Phase.DATA):
                groups = await asyncio.to_thread(self._data_source.get_samples, count)
            if not groups:
                if not books.outstanding():
                    raise DataError(
                        f"rollout {books.next_round}: the data source gave no group when asked for {count}"
                    )
                return
            for group in groups:
                self._submit(*books.young(group, oldest_weights(group, books.weights)))

    def _submit(self, group: list[Sample], weights: int, *, waits: bool = False) -> None:
        before = [snapshot(sample) for sample in group]
        task = asyncio.Task(
            self._work(group, waits),
            loop=asyncio.get_running_loop(),
            name=f"group {group_index(group)}",
            eager_start=True,  # so that its samples are counted before the next group is begun
        )
        self.books.running[task] = Running(group, before, weights)
        if task.done():
            self._collect(task)
        else:
            task.add_done_callback(self._collect)

    async def _work(self, group: list[Sample], waits: bool) -> Group:
        if waits:
            await settle()
        params = self._state.sampling_params
        return await generate_and_rm_group(self._args, group, params, stream=SEED_STREAM)

    def _collect(self, task: asyncio.Task[Group]) -> None:
        """What becomes of a group that has ended."""
        running = self.books.running.pop(task, None)
        if running is None or task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._failure = error
        elif is_unfinished(task.result()):
            self._go_on(task.result(), running)
        else:
            self._judge(task.result(), running)
        self._wake.set()
        self._changed.set()

    def _judge(self, group: Group, running: Running) -> None:
        books, samples = self.books, flatten(group)
        if self._args.rollout_all_samples_process_path:
            self._finished.append(group)
        is_failed = all(sample.status is Status.FAILED for sample in samples)
        self._all_failed = [*self._all_failed, group] if is_failed else []
        whole = Whole(group, running.before, oldest_weights(samples, running.weights))
        if books.bound.is_too_old(whole.weights, books.next_round):
            self._submit(*books.young(whole.before, whole.weights))
            return
        verdict = call_dynamic_filter(self._filter, self._args, samples)
        reason = verdict.reason or "filter"
        if verdict.keep:
            books.whole.append(whole)
        elif verdict.keep_when_insufficient:
            books.reserve.append((whole, reason))
        else:
            books.drop(group, reason)

    def _go_on(self, group: Group, running: Running) -> None:
        """A group that an engine ended: its answers go on where they can, or are asked for anew."""
        self._num_early += 1
        args, params = self._args, self._state.sampling_params
        samples = [sample for sample in group if isinstance(sample, Sample)]
        keeps = args.partial_rollout or (self._is_plain(running.group) and can_go_on(params))
        if len(samples) < len(group) or not keeps:
            anew = [renewed(sample) for sample in running.before]
            self._submit(anew, self.books.weights, waits=True)
            return
        kept = [
            sample if sample.response_length and sample.status is not Status.FAILED else fresh
            for sample, fresh in zip(samples, running.before, strict=True)
        ]
        self._submit(kept, running.weights, waits=True)

    def _is_plain(self, group: Sequence[Sample]) -> bool:
        """Whether slime's own generate function answers."""
        is_users = self._args.custom_generate_function_path is not None
        return not is_users and all(sample.generate_function_path is None for sample in group)

    def _check_progress(self) -> None:
        """Stop what cannot succeed: every sample fails, or engines abort on their own."""
        books = self.books
        if len(self._all_failed) >= books.bound.batch:
            where = f"rollout {books.next_round}, the last {len(self._all_failed)} groups"
            raise_if_all_failed(self._state, self._all_failed, where)
        if self._num_early > MAX_EARLY_ABORTS * books.bound.batch:
            raise EngineError(
                f"rollout {books.next_round}: {self._num_early} groups were aborted while only "
                f"{len(books.whole)} of {books.bound.batch} became whole; does something else send "
                f"/abort_request to {', '.join(self._args.engine_urls)}?"
            )

    def _late_message(self, rollout_id: int) -> str:
        books = self.books
        return (
            f"rollout {rollout_id} was not there within {self._args.rollout_timeout_s:g} s "
            f"(--rollout-timeout-s): {len(books.whole)} of {books.bound.batch} groups are whole, "
            f"{len(books.running)} on their way, the engines' weights those after {books.weights} "
            f"rounds; look at the engines {', '.join(self._args.engine_urls)} and the reward function."
        )

    # --- checkpoints ---

    @asynccontextmanager
    async def _still(self, is_wanted: bool) -> AsyncIterator[None]:
        """Inside, no request of slime's own generate function runs: samples have all their tokens.

        Requests of a user's function are left alone.
        """
        params = self._state.sampling_params
        is_anybodys = self._args.custom_generate_function_path is not None or not can_go_on(params)
        if not is_wanted or not self.books.running or is_anybodys:
            yield
            return
        async with self._engines:
            self._state.hold()
            try:
                with phase(Phase.SAVE):
                    await self._cut()
                yield
            finally:
                self._state.release()

    async def _cut(self) -> None:
        """Let the engines end what they write; it goes on afterwards."""
        interval_s, deadline = FIRST_ABORT_INTERVAL_S, time.monotonic() + ABORT_TIMEOUT_S
        while self._state.num_asking and time.monotonic() < deadline:
            await abort_engines(self._args, self._state)
            for _ in itertools.repeat(None, LOOKS):
                if not self._state.num_asking:
                    return
                await asyncio.sleep(interval_s / LOOKS)
            interval_s = min(2 * interval_s, MAX_ABORT_INTERVAL_S)
        if self._state.num_asking:
            logger.warning(
                "%d requests still ran %.0f s after they were cut for a checkpoint: it holds their "
                "samples without what they write",
                self._state.num_asking,
                ABORT_TIMEOUT_S,
            )

    async def _save(
        self, rollout_id: int, data_source: DataSource, unfinished: Sequence[Unfinished]
    ) -> None:
        with phase(Phase.SAVE):
            if self._args.save is not None:
                await asyncio.to_thread(save_unfinished, self._args.save, rollout_id, unfinished)
            await asyncio.to_thread(data_source.save, rollout_id)
