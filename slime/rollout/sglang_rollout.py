"""The default rollout function: submit groups, collect, filter, abort the rest of a full round.

Custom generate functions find here what they build on: GenerateState, generate, generate_and_rm,
generate_and_rm_group, abort.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from slime.data.data_source import DataSource
from slime.data.sample import Sample
from slime.engines.client import EngineClient
from slime.errors import ConfigError, DataError, DeadlineExceeded, EngineError
from slime.observability.doctor import late_report
from slime.observability.phases import Phase, side_by_side
from slime.plugins import load_function
from slime.rollout import loop
from slime.rollout.base_types import (
    Execution,
    GroupFates,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    flatten,
)
from slime.rollout.evaluate import eval_rollout
from slime.rollout.filter_hub.base_types import call_dynamic_filter, drop_metrics
from slime.rollout.generate import generate
from slime.rollout.groups import (
    generate_and_rm,
    generate_and_rm_group,
    is_unfinished,
    raise_if_all_failed,
    snapshot,
)
from slime.rollout.state import GenerateState, progress

__all__ = [
    "GenerateState",
    "abort",
    "eval_rollout",
    "generate",
    "generate_and_rm",
    "generate_and_rm_group",
    "generate_rollout",
    "generate_rollout_async",
]

logger = logging.getLogger(__name__)

Status = Sample.Status
Group = list[Execution]

# How long groups may take to come to rest after the abort: a reward or a tool call may be running.
ABORT_TIMEOUT_S = 120.0
ABORT_REQUEST_TIMEOUT_S = 10.0
FIRST_ABORT_INTERVAL_S = 0.05
MAX_ABORT_INTERVAL_S = 2.0
# Groups begun in one turn of the event loop, whose other callers wait meanwhile.
SUBMITTED_AT_ONCE = 16
# Groups an engine may abort unasked in one round, in multiples of rollout_batch_size.
MAX_EARLY_ABORTS = 10


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One round of samples for training, or one evaluation of all datasets.

    Blocks until it is done; the work happens on the process's event loop.

    Raises:
        DeadlineExceeded: not done within `args.rollout_timeout_s`.
        EngineError: every sample failed; carries the first cause.
    """
    if evaluation:
        return loop.run(eval_rollout(args, rollout_id))
    return loop.run(generate_rollout_async(args, rollout_id, data_source))


async def generate_rollout_async(
    args: Any, rollout_id: int, data_source: DataSource
) -> RolloutFnTrainOutput:
    """`rollout_batch_size` groups in the order of their prompts; as `generate_rollout`."""
    started = time.monotonic()
    current = _Round(args, rollout_id, data_source)
    limit = asyncio.timeout(args.rollout_timeout_s)
    try:
        async with limit:
            await current.state.learn_version()
            await current.collect()
            await current.return_the_rest()
    except TimeoutError as error:
        if not limit.expired():
            raise
        # Before the tasks are cancelled: what they wait for is what matters.
        message = await asyncio.to_thread(late_report, current.late_message())
        raise DeadlineExceeded(message) from error
    finally:
        await loop.cancel(current.tasks)
        progress.end()
    output = current.output()
    logger.info(
        "rollout %d: %d groups in %.1f s (%d dropped, %d given back)",
        rollout_id,
        len(output.samples),
        time.monotonic() - started,
        sum(map(len, current.drops.values())),
        len(current.leftovers),
    )
    return output


async def abort(args: Any, rollout_id: int) -> None:
    """Return once no task of the round runs: engines drop requests, waiting ones are not sent.

    The call is repeated while tasks run, as a request may have been on its way, or a tool may send
    the next turn. Tasks that outlive ABORT_TIMEOUT_S are cancelled.
    """
    state = GenerateState(args)
    state.aborted = True
    interval_s, deadline = FIRST_ABORT_INTERVAL_S, time.monotonic() + ABORT_TIMEOUT_S
    pending = {task for task in state.pending if not task.done()}
    while pending and time.monotonic() < deadline:
        await abort_engines(args, state)
        _, pending = await asyncio.wait(pending, timeout=interval_s)
        interval_s = min(2 * interval_s, MAX_ABORT_INTERVAL_S)
    if pending:
        logger.warning(
            "rollout %d: %d groups still ran %.0f s after the abort and were cancelled",
            rollout_id,
            len(pending),
            ABORT_TIMEOUT_S,
        )
        await loop.cancel(pending)


async def abort_engines(args: Any, state: GenerateState) -> None:
    """Let every engine end what it writes now; the requests come back with what they have."""
    await loop.gather(_abort_all(state.client, url) for url in args.engine_urls)


async def _abort_all(client: EngineClient, url: str) -> None:
    try:
        # Straight to the engine: the router forwards no control calls.
        await client.post(
            f"{url}/abort_request",
            {"abort_all": True},
            timeout_s=ABORT_REQUEST_TIMEOUT_S,
            max_retries=0,
        )
    except EngineError as error:
        logger.warning("could not abort the requests of %s: %s", url, error)


class _Round:
    """The books of one round.

    Attributes:
        tasks: running groups, each with a snapshot from before it started, oldest first.
        finished: groups that were answered, whatever became of them then.
        accepted: those to train on.
        reserve: those the filter dropped but would take if groups lack, with the reason.
        drops: numbers of the groups dropped, by reason.
        leftovers: groups for the data source to take back.
    """

    def __init__(self, args: Any, rollout_id: int, data_source: DataSource) -> None:
        self.args = args
        self.rollout_id = rollout_id
        self.data_source = data_source
        self.target: int = args.rollout_batch_size
        self.state = GenerateState(args)
        self.state.start_round(rollout_id)
        progress.begin(rollout_id, self.target)
        path = args.dynamic_sampling_filter_path
        self.filter = load_function(path) if path else None
        self.tasks: dict[asyncio.Task[Group], list[Sample]] = {}
        self.is_one_done = asyncio.Event()
        self.finished: list[Group] = []
        self.accepted: list[Group] = []
        self.reserve: list[tuple[Group, str]] = []
        self.drops: defaultdict[str, list[int]] = defaultdict(list)
        self.leftovers: list[list[Sample]] = []

    async def collect(self) -> None:
        """Submit and collect until `target` groups are accepted."""
        while len(self.accepted) < self.target:
            await self._fill()
            await self._one_is_done()
            # In the order of submission, so that the same answers give the same batch.
            for task in [task for task in self.tasks if task.done()]:
                self._collect_group(task.result(), self.tasks.pop(task))
            self._use_reserve()
            progress.accepted = len(self.accepted)
            progress.dropped = sum(map(len, self.drops.values()))
            self._check_progress()
        for group, reason in self.reserve:
            self._drop(group, reason)

    async def return_the_rest(self) -> None:
        """Abort what still runs and give prompts, or partial answers, back to the data source."""
        if self.tasks:
            await abort(self.args, self.rollout_id)
        for task, before in self.tasks.items():
            self._give_back(None if task.cancelled() else task.result(), before)
        if not self.leftovers:
            return
        try:
            with side_by_side(Phase.DATA):
                await asyncio.to_thread(self.data_source.add_samples, self.leftovers)
        except ConfigError as error:
            if self.args.partial_rollout:
                raise
            logger.warning("the prompts of %d groups are lost: %s", len(self.leftovers), error)

    def output(self) -> RolloutFnTrainOutput:
        """The accepted groups in the order of their prompts, and the round's own metrics."""
        groups = sorted(self.accepted, key=prompt_order)
        if path := self.args.rollout_sample_filter_path:
            load_function(path)(self.args, groups)
        if path := self.args.rollout_all_samples_process_path:
            everything = sorted(self.finished, key=prompt_order)
            load_function(path)(self.args, everything, self.data_source)
        metrics: dict[str, Any] = {
            **drop_metrics({reason: len(groups) for reason, groups in self.drops.items()}),
            **self.state.request_metrics(),
            "rollout/aborted_groups": len(self.leftovers),
        }
        fates = GroupFates(dict(self.drops), [group_index(group) for group in self.leftovers])
        return RolloutFnTrainOutput(samples=groups, metrics=metrics, fates=fates)

    def late_message(self) -> str:
        """What to say when the deadline is over."""
        return (
            f"rollout {self.rollout_id} was not done within {self.args.rollout_timeout_s:g} s "
            f"(--rollout-timeout-s): {len(self.accepted)} of {self.target} groups accepted, "
            f"{sum(map(len, self.drops.values()))} dropped by the filter, {len(self.tasks)} unfinished; look "
            f"at the engines {', '.join(self.args.engine_urls)} and the reward function."
        )

    async def _fill(self) -> None:
        """Submit `over_sampling_batch_size` groups at a time while too few are on their way."""
        size = self.args.over_sampling_batch_size or self.target
        while len(self.accepted) + len(self.reserve) + len(self.tasks) < self.target:
            with side_by_side(Phase.DATA):
                groups = await asyncio.to_thread(self.data_source.get_samples, size)
            if not groups:
                raise DataError(
                    f"rollout {self.rollout_id}: the data source gave no group when asked for "
                    f"{size}; {len(self.accepted)} of {self.target} groups are done"
                )
            for number, group in enumerate(groups, start=1):
                self._submit(group)
                if number % SUBMITTED_AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def _one_is_done(self) -> None:
        """Return once a task is done; `asyncio.wait` would call back each one anew each time."""
        self.is_one_done.clear()
        if not any(task.done() for task in self.tasks):
            await self.is_one_done.wait()

    def _note_done(self, task: asyncio.Task[Group]) -> None:
        self.state.pending.discard(task)
        self.is_one_done.set()

    def _submit(self, group: list[Sample]) -> None:
        before = [snapshot(sample) for sample in group]
        work = generate_and_rm_group(self.args, group, self.state.sampling_params)
        task = asyncio.create_task(work, name=f"rollout {self.rollout_id}")
        self.tasks[task] = before
        self.state.pending.add(task)
        task.add_done_callback(self._note_done)

    def _collect_group(self, group: Group, before: list[Sample]) -> None:
        if is_unfinished(group):
            self._give_back(group, before)
            return
        self.finished.append(group)
        if len(self.accepted) >= self.target:
            self._give_back(group, before)
            return
        verdict = call_dynamic_filter(self.filter, self.args, flatten(group))
        reason = verdict.reason or "filter"
        if verdict.keep:
            self.accepted.append(group)
        elif verdict.keep_when_insufficient:
            self.reserve.append((group, reason))
        else:
            self._drop(group, reason)

    def _drop(self, group: Group, reason: str) -> None:
        self.drops[reason].append(group_index(flatten(group)))

    def _use_reserve(self) -> None:
        """Accept reserved groups where another over-sampling round would have to start."""
        while self.reserve and len(self.accepted) + len(self.tasks) < self.target:
            group, _ = self.reserve.pop(0)
            self.accepted.append(group)

    def _give_back(self, group: Group | None, before: list[Sample]) -> None:
        """Keep the group for the data source: its partial answers, or just its prompts.

        Without --partial-rollout the prompts are asked afresh, so that none is lost. A group that
        was cancelled or has fanned out cannot be resumed and starts afresh too.
        """
        if not self.args.partial_rollout or group is None:
            self.leftovers.append(before)
            return
        samples = [sample for sample in group if isinstance(sample, Sample)]
        if len(samples) < len(group):
            self.leftovers.append(before)
            return
        kept = [
            sample if sample.response_length and sample.status is not Status.FAILED else fresh
            for sample, fresh in zip(samples, before, strict=True)
        ]
        for sample in kept:
            if sample.response_length:
                sample.metadata.setdefault("start_rollout_id", self.rollout_id)
        self.leftovers.append(kept)

    def _check_progress(self) -> None:
        """Stop a round that cannot succeed: every sample fails, or engines abort on their own."""
        if len(self.leftovers) > MAX_EARLY_ABORTS * self.target:
            raise EngineError(
                f"rollout {self.rollout_id}: {len(self.leftovers)} groups were aborted while only "
                f"{len(self.accepted)} of {self.target} were accepted; does something else send "
                f"/abort_request or /pause_generation to {', '.join(self.args.engine_urls)}?"
            )
        if len(self.finished) >= self.target:
            raise_if_all_failed(self.state, self.finished, f"rollout {self.rollout_id}")


def group_index(group: Sequence[Sample]) -> int:
    """Number of a group; -1 where the data source gave none."""
    return next((sample.group_index for sample in group if sample.group_index is not None), -1)


def prompt_order(group: Sequence[Execution]) -> tuple[bool, int]:
    """Sorts groups by their numbers, those without one last."""
    index = next((sample.group_index for sample in flatten(group)), None)
    return index is None, index or 0
