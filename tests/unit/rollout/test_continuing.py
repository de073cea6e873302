"""Answers that an engine cuts short go on; the engine is a fake one that cuts as it is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import FakeDataSource, make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.sample import Sample
from slime.rollout import continuing
from slime.rollout.continuing import cut_at_stop, rest_params
from slime.rollout.generate import generate
from slime.rollout.groups import generate_and_rm_group
from slime.rollout.state import GenerateState

Status = Sample.Status


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuing, "FIRST_WAIT_S", 0.0)


def fresh() -> Sample:
    return Sample(index=0, prompt="abc", tokens=[5, 6], session_id="s1")


def cutting(*parts: tuple[int, ...]) -> Callable[[Payload, int], Reply]:
    """Request i is answered with part i; all but the last end by an abort."""
    last = len(parts) - 1
    return lambda payload, number: Reply(
        ids=parts[number], finish="stop" if number == last else "abort"
    )


async def run(args: Any, engine: FakeEngine, versions: list[str], **params: Any) -> Sample:
    """A sample, answered; the weights change with each request."""
    answer = engine.on_generate

    def on_generate(payload: Payload, number: int) -> Reply:
        engine.weight_version = versions[number]
        return answer(payload, number)

    engine.on_generate = on_generate
    return await generate(args, fresh(), {"max_new_tokens": 10, "sampling_seed": 7, **params})


async def test_the_rest_is_asked_for_with_the_tokens_that_are_there(tmp_path: Path):
    async with fake_engine(cutting((30, 31), (), (32,), (40, 41))) as engine:
        args = make_args(engine.url, hf_checkpoint=make_char_tokenizer(tmp_path))
        sample = await run(args, engine, ["3", "4", "4", "5"], min_new_tokens=4)
        text = GenerateState(args).tokenizer.decode([30, 31, 32, 40, 41])
        assert GenerateState(args).request_metrics()["rollout/continued_answers"] == 3
    assert [request["input_ids"] for request in engine.requests] == [
        [5, 6], [5, 6, 30, 31], [5, 6, 30, 31], [5, 6, 30, 31, 32],
    ]  # fmt: skip
    params = [request["sampling_params"] for request in engine.requests]
    assert [p["max_new_tokens"] for p in params] == [10, 8, 8, 7]
    assert [p["min_new_tokens"] for p in params] == [4, 2, 2, 1]
    # The numbers of the first request are spent; one that was not begun asks for the same.
    seeds = [p["sampling_seed"] for p in params]
    assert seeds[0] == 7
    assert seeds[1] == seeds[2]
    assert len(set(seeds)) == 3
    assert sample.tokens == [5, 6, 30, 31, 32, 40, 41]
    assert sample.rollout_log_probs == [-0.5] * 5
    assert sample.version_spans == [(0, "3"), (2, "4"), (3, "5")]
    assert sample.weight_versions == ["3", "4", "4", "5"]
    assert (sample.status, sample.response) == (Status.COMPLETED, text)
    sample.validate()


async def test_a_later_turn_keeps_the_text_before_it(tmp_path: Path):
    async with fake_engine(cutting((30,), (31,))) as engine:
        args = make_args(engine.url, hf_checkpoint=make_char_tokenizer(tmp_path))
        sample = fresh()
        sample.append_response_tokens(args, tokens=[20], log_probs=[-1.0], text="first")
        sample.append_response_tokens(args, tokens=[21], trainable=False, text="tool")
        sample.status = Status.COMPLETED
        await generate(args, sample, {"max_new_tokens": 10})
        tokenizer = GenerateState(args).tokenizer
    assert sample.response == "firsttool" + tokenizer.decode([30, 31])
    assert sample.version_spans == [(0, "?"), (1, ""), (2, "0")]


async def test_an_answer_that_is_full_when_it_is_cut_is_truncated(tmp_path: Path):
    async with fake_engine(cutting((30, 31), (1,))) as engine:
        args = make_args(engine.url, hf_checkpoint=make_char_tokenizer(tmp_path))
        sample = await generate(args, fresh(), {"max_new_tokens": 2})
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, 2)
    assert len(engine.requests) == 1


async def test_after_the_rounds_abort_nothing_goes_on():
    async with fake_engine(cutting((30, 31), (1,))) as engine:
        args = make_args(engine.url)
        GenerateState(args).aborted = True
        sample = await generate(args, fresh(), {"max_new_tokens": 10})
    assert (sample.status, len(engine.requests)) == (Status.ABORTED, 1)


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 0.5}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}]
)
async def test_penalties_cannot_go_on(penalty: dict[str, float]):
    async with fake_engine(cutting((30, 31), (1,))) as engine:
        sample = await generate(make_args(engine.url), fresh(), penalty)
    assert (sample.status, len(engine.requests)) == (Status.ABORTED, 1)


async def test_an_answer_that_never_gets_on_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(continuing, "MAX_EMPTY_CUTS", 3)
    async with fake_engine(lambda payload, number: Reply(ids=(), finish="abort")) as engine:
        sample = await generate(make_args(engine.url), fresh(), {"max_new_tokens": 10})
    assert (sample.status, len(engine.requests)) == (Status.ABORTED, 4)


async def test_answers_of_a_group_go_on_one_by_one(tmp_path: Path):
    def on_generate(payload: Payload, number: int) -> Reply:
        return Reply(ids=(40,)) if number else Reply(ids=(30, 31), finish="abort")

    async with fake_engine(on_generate) as engine:
        args = make_args(
            engine.url,
            engine_supports_group_seeds=True,
            hf_checkpoint=make_char_tokenizer(tmp_path),
        )
        group = FakeDataSource(args).get_samples(1)[0]
        await generate_and_rm_group(args, group, {"max_new_tokens": 10})
    assert [sample.tokens for sample in group] == [[5, 6, 30, 31, 40]] * 2
    assert {sample.status for sample in group} == {Status.COMPLETED}
    assert [sample.reward for sample in group] == [1.0, 1.0]
    rest = engine.requests[1:]
    assert [request["input_ids"] for request in rest] == [[5, 6, 30, 31]] * 2
    assert len({request["sampling_params"]["sampling_seed"] for request in rest}) == 2


async def test_a_stop_string_across_a_cut_ends_the_answer(tmp_path: Path):
    path = make_char_tokenizer(tmp_path)
    tokenizer = GenerateState(make_args("http://127.0.0.1:1", hf_checkpoint=path)).tokenizer
    stop = tokenizer.decode([31, 32, 33])
    async with fake_engine(cutting((30, 31), (32, 33, 34, 35))) as engine:
        args = make_args(engine.url, hf_checkpoint=path)
        sample = await generate(args, fresh(), {"max_new_tokens": 10, "stop": [stop]})
    assert sample.tokens == [5, 6, 30, 31, 32, 33]
    assert sample.response.endswith(stop)
    assert sample.rollout_log_probs == [-0.5] * 4
    assert sample.status is Status.COMPLETED


def test_a_stop_string_of_the_rest_alone_is_the_engines_business(tmp_path: Path):
    path = make_char_tokenizer(tmp_path)
    tokenizer = GenerateState(make_args("http://127.0.0.1:1", hf_checkpoint=path)).tokenizer
    stop = tokenizer.decode([32, 33])
    answer = {"meta_info": {"output_token_logprobs": [[-0.5, i, None] for i in (32, 33)]}}
    assert cut_at_stop(answer, [30, 31], [stop], tokenizer) is answer
    # What began before, and goes on after, is found with any number of tokens around it.
    meta = {"output_token_logprobs": [[-0.5, i, None] for i in (33, 40)], "routed_experts": "x"}
    cut = cut_at_stop({"meta_info": meta}, [*range(20, 32), 32], [stop, "never"], tokenizer)
    assert cut["meta_info"] == {
        "output_token_logprobs": [[-0.5, 33, None]],
        "completion_tokens": 1,
        "finish_reason": {"type": "stop", "matched": stop},
    }


def test_parameters_of_an_answer_that_was_not_begun_stay() -> None:
    params = {"sampling_seed": 3, "min_new_tokens": 2, "max_new_tokens": 5}
    assert rest_params(params, 0) == params
