"""A stream of groups on a fake engine: rounds, ages, filters, evaluations, checkpoints."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import FakeDataSource, make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.sample import Sample
from slime.errors import DataError, DeadlineExceeded, SlimeError
from slime.rollout import continuing
from slime.rollout.base_types import RolloutFnTrainOutput, flatten
from slime.rollout.fully_async_rollout import restore
from slime.rollout.state import GenerateState
from slime.rollout.stream import Stream
from slime.rollout.unfinished import load_unfinished

Status = Sample.Status
PLUGINS = "support.rollout_plugins"


def prompt_of(payload: Payload) -> int:
    return payload["input_ids"][0] - 5


class NumberedSource(FakeDataSource):
    """Tells, as slime's own, which group comes next."""

    @property
    def sample_group_index(self) -> int:
        return self.next_group


class World:
    """A stream, its engine and its data, driven as train_async.py does."""

    def __init__(self, engine: FakeEngine, **flags: Any) -> None:
        defaults = {"fully_async": True, "num_rollout": 50, "update_weight_pause_mode": "retract"}
        self.args = make_args(engine.url, **(defaults | flags))
        self.engine = engine
        self.source = NumberedSource(self.args)
        self.stream = Stream.of(self.args)

    async def sync(self, trained_rounds: int) -> None:
        self.engine.weight_version = str(trained_rounds + 1)
        await self.stream.note_weights(trained_rounds)

    async def round(self, rollout_id: int) -> RolloutFnTrainOutput:
        return await self.stream.next_round(rollout_id, self.source)

    async def until_whole(self, count: int) -> None:
        """Return once so many groups wait for a round."""
        async with asyncio.timeout(10):
            while len(self.stream.books.whole) < count:
                self.stream._changed.clear()
                await self.stream._changed.wait()


@asynccontextmanager
async def world(
    on_generate: Callable[[Payload, int], Reply] | None = None, **flags: Any
) -> AsyncIterator[World]:
    async with fake_engine(on_generate) as engine:
        made = World(engine, **flags)
        try:
            yield made
        finally:
            await made.stream.close()


def groups_of(output: RolloutFnTrainOutput) -> list[int | None]:
    return [flatten(group)[0].group_index for group in output.samples]


def holding(*prompts: int) -> Callable[[Payload, int], Reply]:
    return lambda payload, number: Reply(ids=(50, 51), hold=prompt_of(payload) in prompts)


async def test_groups_that_are_whole_make_a_round_and_the_slow_ones_go_on() -> None:
    async with world(holding(0)) as w:
        await w.sync(0)
        first = await w.round(0)
        await w.sync(1)
        second = await w.round(1)
        assert groups_of(first) == [1, 2]
        assert 0 not in groups_of(second)
        w.engine.release()
        third = await w.round(2)
    # Group 0 would be too old for round 3, and round 2 has it.
    slow = flatten(third.samples[0])
    assert [sample.tokens[-2:] for sample in slow] == [[50, 51]] * 2
    assert third.metrics is not None
    assert third.metrics["rollout/staleness/max"] == 2
    # Six groups were begun with the first weights; rounds 0 and 1 took four of them.
    assert groups_of(third) == [0, 5]
    assert third.metrics["rollout/staleness/2"] == 1.0
    # Nothing was asked twice.
    assert sum(prompt_of(request) == 0 for request in w.engine.requests) == 2


async def test_a_round_waits_for_a_group_that_the_next_one_may_not_train() -> None:
    async with world(holding(0), max_weight_staleness=1) as w:
        await w.sync(0)
        await w.round(0)
        await w.sync(1)
        task = asyncio.create_task(w.round(1))
        await w.until_whole(2)
        await asyncio.sleep(0.05)
        assert not task.done()
        w.engine.release()
        assert 0 in groups_of(await task)


async def test_no_more_groups_are_begun_than_may_be_trained() -> None:
    async with world(max_weight_staleness=1) as w:
        await w.sync(0)
        task = asyncio.create_task(w.round(0))
        await task
        await w.until_whole(2)
        await asyncio.sleep(0.05)
        # Weights 0 may write for rounds 0 and 1.
        assert w.source.next_group == 4
        await w.round(1)
        waits = asyncio.create_task(w.round(2))
        await asyncio.sleep(0.05)
        assert not waits.done()
        await w.sync(1)
        output = await waits
        assert groups_of(output) == [4, 5]
        assert output.metrics is not None
        assert output.metrics["rollout/staleness/max"] == 1


async def test_the_run_begins_no_group_that_no_round_trains() -> None:
    async with world(max_weight_staleness=9, num_rollout=3) as w:
        await w.sync(0)
        taken = [groups_of(await w.round(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        assert w.source.next_group == 6
        assert sorted(number for numbers in taken for number in numbers) == list(range(6))


async def test_the_engines_places_are_kept_full_and_not_overfull() -> None:
    most = 0

    def on_generate(payload: Payload, number: int) -> Reply:
        nonlocal most
        most = max(most, GenerateState(w.args).num_wanted)
        return Reply()

    async with world(on_generate, sglang_server_concurrency=4, max_weight_staleness=9) as w:
        await w.sync(0)
        for i in range(4):
            await w.round(i)
    # A group of two more may wait, so that a place that becomes free is taken at once.
    assert 4 <= most <= 5


async def test_numbers_of_a_round_tell_what_became_of_every_group() -> None:
    async with world(holding(1), dynamic_sampling_filter_path=f"{PLUGINS}.keep_odd_prompts") as w:
        await w.sync(0)
        first = await w.round(0)
        await w.sync(1)
        w.engine.release()
        second = await w.round(1)
    known: set[int] = set()
    for output in (first, second):
        assert output.fates is not None
        assert output.fates.taken is not None
        came = known | set(range(*output.fates.taken))
        dropped = {group for groups in output.fates.dropped.values() for group in groups}
        accepted = set(groups_of(output))
        assert came == accepted | dropped | set(output.fates.returned)
        assert not accepted & dropped
        assert all(group % 2 for group in accepted)
        known = set(output.fates.returned)
    assert first.metrics is not None
    assert first.metrics["rollout/dynamic_filter/drop_even"] > 0


async def test_an_answer_that_an_engine_ended_goes_on_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.001)

    def on_generate(payload: Payload, number: int) -> Reply:
        return Reply(ids=(60,), finish="abort" if len(payload["input_ids"]) == 2 else "stop")

    tokenizer = make_char_tokenizer(tmp_path)
    async with world(on_generate, max_weight_staleness=0, hf_checkpoint=tokenizer) as w:
        await w.sync(0)
        output = await w.round(0)
    for sample in (sample for group in output.samples for sample in flatten(group)):
        assert sample.tokens[2:] == [60, 60]
        assert sample.status is Status.COMPLETED


async def test_an_evaluation_has_books_of_its_own_and_generation_goes_on(tmp_path: Path) -> None:
    async with world(max_weight_staleness=3) as w:
        await w.sync(0)
        await w.round(0)
        state = GenerateState(w.args)
        assert w.stream.eval_args is not w.args
        assert GenerateState(w.stream.eval_args) is not state
        async with w.stream._engines:  # as an evaluation holds it
            output = await w.round(1)
        assert len(output.samples) == 2


async def test_all_samples_failing_ends_the_run_with_the_first_cause() -> None:
    async with world(lambda payload, number: Reply(status=400)) as w:
        await w.sync(0)
        with pytest.raises(SlimeError, match=r"all \d+ samples failed; the first cause"):
            await w.round(0)


async def test_an_empty_data_source_is_named() -> None:
    async with world() as w:
        w.source.num_groups = 0
        await w.sync(0)
        with pytest.raises(DataError, match="gave no group"):
            await w.round(0)


async def test_a_round_that_does_not_come_says_what_it_waits_for() -> None:
    async with world(holding(*range(40)), rollout_timeout_s=0.2) as w:
        await w.sync(0)
        with pytest.raises(DeadlineExceeded, match="0 of 2 groups are whole, 6 on their way"):
            await w.round(0)


# --- checkpoints ---


async def saved_world(tmp_path: Path, **flags: Any) -> tuple[RolloutFnTrainOutput, World]:
    """A round that was handed out with a save, while groups 0 and 3 were being written."""
    async with world(holding(0, 3), save=str(tmp_path), **flags) as w:
        await w.sync(0)
        w.stream.saves_next = True
        output = await w.round(0)
        assert w.engine.num_aborts == (0 if flags else 1)
        w.engine.release()
        return output, w


async def test_a_checkpoint_holds_the_tokens_of_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.001)
    output, _ = await saved_world(tmp_path)
    saved = {item.before[0].group_index: item for item in load_unfinished(str(tmp_path), 0)}
    assert output.fates is not None
    assert set(saved) == set(output.fates.returned)
    assert saved[0].weights == 0
    for number in (0, 3):
        assert not saved[number].is_whole
        for sample in flatten(saved[number].group):
            assert (sample.status, sample.tokens[2:]) == (Status.ABORTED, [50, 51])
            assert sample.rollout_log_probs == [-0.5, -0.5]
    assert all(item.is_whole for number, item in saved.items() if number not in (0, 3))


async def test_a_resumed_run_goes_on_with_it_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.001)
    before, old = await saved_world(tmp_path)
    assert before.fates is not None
    tokenizer = make_char_tokenizer(tmp_path / "tokenizer")
    async with world(load=str(tmp_path), hf_checkpoint=tokenizer) as w:
        w.source.next_group = old.source.next_group
        restore(w.args, w.source, 0)
        await w.sync(1)
        outputs = [await w.round(1), await w.round(2)]
    trained = [number for output in outputs for number in groups_of(output)]
    assert sorted(trained) == sorted(before.fates.returned)
    rest = [request for request in w.engine.requests if prompt_of(request) in (0, 3)]
    assert [request["input_ids"][2:] for request in rest] == [[50, 51]] * 4
    samples = [s for output in outputs for group in output.samples for s in flatten(group)]
    assert all(sample.reward is not None for sample in samples)
    (slow, *_) = [sample for sample in samples if sample.group_index == 0]
    assert [version for _, version in slow.version_spans] == ["1", "2"]


async def test_a_checkpoint_disturbs_no_function_of_a_user(tmp_path: Path) -> None:
    path = f"{PLUGINS}.two_turns"
    _, _ = await saved_world(tmp_path, custom_generate_function_path=path)
    saved = {item.before[0].group_index: item for item in load_unfinished(str(tmp_path), 0)}
    # What it writes belongs to it: its prompts are there.
    assert all(sample.response_length == 0 for sample in flatten(saved[0].group))


async def test_groups_too_old_for_a_run_with_other_flags_are_asked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.001)
    before, old = await saved_world(tmp_path)
    assert before.fates is not None
    async with world(load=str(tmp_path), max_weight_staleness=0, rollout_batch_size=4) as w:
        w.source.next_group = old.source.next_group
        restore(w.args, w.source, 0)
        await w.sync(1)
        output = await w.round(1)
    assert groups_of(output) == sorted(before.fates.returned)
    assert output.metrics is not None
    assert output.metrics["rollout/renewed_groups"] == 4
    assert output.metrics["rollout/staleness/max"] == 0
    samples = [s for group in output.samples for s in flatten(group)]
    assert all(sample.weight_versions == ["2"] for sample in samples)


async def test_a_run_that_generates_by_rounds_takes_the_groups_into_its_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.001)
    before, _ = await saved_world(tmp_path)
    async with world(load=str(tmp_path), fully_async=False) as w:
        restore(w.args, w.source, 0)
    assert before.fates is not None
    numbers = [group[0].group_index for group in w.source.buffer]
    assert sorted(numbers) == sorted(before.fates.returned)
