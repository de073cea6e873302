import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.sample import Sample
from slime.engines.request_scope import request_scope
from slime.errors import DeadlineExceeded
from slime.rollout.state import GenerateState
from slime.rollout.turns import Turns, sibling_of

Status = Sample.Status
END = 2  # <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_char_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer_path: str) -> Callable[..., Any]:
    def args_of(engine: FakeEngine, **overrides: Any) -> Any:
        return make_args(engine.url, hf_checkpoint=tokenizer_path, **overrides)

    return args_of


def saying(state_args: list[Any], *texts: str) -> Callable[[Payload, int], Reply]:
    """An engine that answers one text after the other, each with the end token."""

    def reply(payload: Payload, number: int) -> Reply:
        tokenizer = GenerateState(state_args[0]).tokenizer
        ids = tokenizer(texts[number % len(texts)], add_special_tokens=False)["input_ids"]
        return Reply(ids=(*ids, END))

    return reply


def chat() -> Sample:
    return Sample(index=3, group_index=1, prompt=[{"role": "user", "content": "2+3?"}])


async def test_tokens_of_a_conversation_are_those_of_its_template(make: Callable[..., Any]):
    known: list[Any] = []
    async with fake_engine(saying(known, "I call", "It is 5")) as engine:
        known.append(args := make(engine))
        sample = chat()
        turns = Turns(args, sample, {"max_new_tokens": 200})
        assert await turns.ask()
        assert turns.text == "I call"
        assert turns.tell_messages([{"role": "tool", "content": "5"}])
        assert await turns.ask()
        assert turns.text == "It is 5"
        tokenizer = GenerateState(args).tokenizer
        whole = tokenizer.apply_chat_template(
            [
                *sample.prompt,  # type: ignore[list-item]
                {"role": "assistant", "content": "I call"},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "It is 5"},
            ],
            tokenize=False,
        )
    assert tokenizer.decode(sample.tokens) == whole.removesuffix("\n")
    assert engine.requests[1]["input_ids"] == sample.tokens[: -len("It is 5") - 1]
    written = [1] * (len("I call") + 1), [1] * (len("It is 5") + 1)
    told = sample.response_length - sum(map(len, written))
    mask = written[0] + [0] * told + written[1]
    assert sample.loss_mask == mask
    assert sample.rollout_log_probs == [-0.5 if trains else 0.0 for trains in mask]
    assert sample.metadata["round_number"] == turns.number == 2
    assert sample.status is Status.COMPLETED


async def test_text_of_a_tool_is_appended_as_it_is(make: Callable[..., Any]):
    async with fake_engine(lambda payload, number: Reply(ids=(40, 41))) as engine:
        args = make(engine)
        sample = chat()
        turns = Turns(args, sample, {})
        assert turns.room is None
        await turns.ask()
        before = list(sample.tokens)
        assert turns.tell("<result>4</result>")
        ids = GenerateState(args).tokenizer("<result>4</result>", add_special_tokens=False)
    assert sample.tokens == before + ids["input_ids"]
    assert sample.loss_mask == [1, 1] + [0] * len(ids["input_ids"])


@pytest.mark.parametrize(
    ("params", "flags", "evaluation", "room"),
    [
        ({"max_new_tokens": 30}, {}, False, 30),
        ({"max_new_tokens": 300}, {"rollout_max_context_len": 50}, False, 50),
        (
            {"max_new_tokens": 300},
            {"rollout_max_context_len": 50, "eval_max_context_len": 60},
            True,
            60,
        ),
        (
            {"max_new_tokens": 30},
            {"rollout_max_context_len": 300, "eval_max_context_len": 60},
            False,
            30,
        ),
    ],
)
async def test_room_counts_response_and_context(
    make: Callable[..., Any],
    params: dict[str, Any],
    flags: dict[str, Any],
    evaluation: bool,
    room: int,
):
    async with fake_engine(lambda payload, number: Reply(ids=(40,) * 5)) as engine:
        sample = chat()
        turns = Turns(make(engine, **flags), sample, params, evaluation=evaluation)
        prompt = len(sample.tokens)
        whole = room if room == 30 else room - prompt
        assert turns.room == whole
        await turns.ask()
        assert turns.room == whole - 5
        assert engine.requests[0]["sampling_params"]["max_new_tokens"] == whole
        await turns.ask()
    assert engine.requests[1]["sampling_params"]["max_new_tokens"] == whole - 5


async def test_what_leaves_no_room_for_an_answer_is_not_appended(make: Callable[..., Any]):
    async with fake_engine(lambda payload, number: Reply(ids=(40,) * 5)) as engine:
        sample = chat()
        turns = Turns(make(engine), sample, {"max_new_tokens": 10})
        assert await turns.ask()
        tokens = list(sample.tokens)
        assert not turns.tell("12345")
        assert sample.status is Status.TRUNCATED
        assert sample.tokens == tokens
        sample.status = Status.COMPLETED
        assert turns.tell("1234")
        assert turns.room == 1
        assert not await turns.ask()  # one token, then the limit
    assert sample.status is Status.TRUNCATED
    assert sample.response_length == 10
    assert not await turns.ask()
    assert len(engine.requests) == 2


async def test_turns_and_their_own_length_are_limited(make: Callable[..., Any]):
    async with fake_engine(lambda payload, number: Reply(ids=(40,) * 5)) as engine:
        sample = chat()
        turns = Turns(make(engine), sample, {"max_new_tokens": 100}, max_turns=2)
        assert not await turns.ask(max_new_tokens=3, stop=["x"])
        assert sample.status is Status.TRUNCATED
        sample.status = Status.COMPLETED
        assert await turns.ask()
        assert not await turns.ask()
    assert sample.status is Status.TRUNCATED
    assert engine.requests[0]["sampling_params"]["stop"] == ["x"]
    assert "stop" not in engine.requests[1]["sampling_params"]
    assert sample.response_length == 3 + 5


async def test_turn_cut_by_an_abort_goes_on_as_the_same_turn(make: Callable[..., Any]):
    replies = [Reply(ids=(40, END)), Reply(ids=(50, 51), finish="abort"), Reply(ids=(52, END))]

    def reply(payload: Any, number: int) -> Reply:
        GenerateState(args).aborted = number == 1  # the round is full, which ends this answer
        return replies[number]

    async with fake_engine(reply) as engine:
        args = make(engine)
        sample = chat()
        turns = Turns(args, sample, {"max_new_tokens": 20})
        assert await turns.ask()
        turns.tell("told")
        assert not await turns.ask()
        assert sample.status is Status.ABORTED
        assert not await turns.ask()  # a function that asks again all the same
        GenerateState(args).aborted = False
        resumed = Turns(args, sample, {"max_new_tokens": 20}, max_turns=2)
        assert await resumed.ask()
        expected = GenerateState(args).tokenizer.decode([50, 51, 52])
    assert resumed.text == expected
    assert resumed.number == 2
    assert sample.loss_mask == [1, 1, 0, 0, 0, 0, 1, 1, 1, 1]


async def test_nothing_is_sent_once_the_round_is_full(make: Callable[..., Any]):
    async with fake_engine(lambda payload, number: Reply(ids=(40, END))) as engine:
        args = make(engine)
        sample = chat()
        turns = Turns(args, sample, {})
        await turns.ask()
        GenerateState(args).aborted = True
        assert not await turns.ask()
        assert sample.status is Status.ABORTED
        GenerateState(args).aborted = False
        resumed = Turns(args, sample, {})
        assert await resumed.ask()
    assert resumed.number == 2
    assert len(engine.requests) == 2


async def answer_after(seconds: float, value: int) -> int:
    await asyncio.sleep(seconds)
    return value


async def broken() -> int:
    raise ValueError("no such city")


async def test_tools_run_together_and_their_results_come_in_order(make: Callable[..., Any]):
    async with fake_engine() as engine:
        turns = Turns(make(engine), chat(), {})
        started = asyncio.Event()

        async def first() -> str:
            await started.wait()
            return "first"

        async def second() -> str:
            started.set()
            return "second"

        with request_scope(1) as scope:
            assert await turns.call(first(), second()) == ["first", "second"]
            results = await turns.call(answer_after(0, 1), broken(), errors="return")
            with pytest.raises(ValueError, match="no such city"):
                await turns.call(answer_after(60, 1), broken())
            with pytest.raises(DeadlineExceeded, match="tool answer_after gave no answer"):
                await turns.call(answer_after(60, 1), timeout_s=0.01)
    assert results[0] == 1
    assert str(results[1]) == "no such city"
    assert (scope.usage.tool_calls, scope.usage.tool_errors) == (7, 3)


def test_siblings_share_the_execution_and_nothing_that_changes():
    sample = chat()
    sample.metadata |= {"level": 1, "round_number": 2, "turn_start": 5}
    sibling = sibling_of(sample, "another prompt")
    assert sibling.rollout_id == sample.rollout_id == 3
    assert (sibling.group_index, sibling.index, sibling.prompt) == (1, 3, "another prompt")
    sibling.metadata["level"] = 2
    assert sample.metadata["level"] == 1
    assert sibling.tokens == []
    assert set(sibling.metadata) == {"level"}


def test_tiny_tokenizer_ends_turns_with_the_id_used_here(tokenizer_path: str):
    from slime.data.chat import load_tokenizer

    assert load_tokenizer(tokenizer_path).eos_token_id == END
    assert Path(tokenizer_path).is_dir()
