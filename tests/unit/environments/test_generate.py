"""Episodes: what reaches the model, what trains, what is kept, and what a broken environment costs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support import environments
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.errors import ConfigError, DataError
from slime.rollout.base_types import flatten
from slime.rollout.groups import generate_and_rm, generate_and_rm_group
from slime.rollout.metrics import sample_metrics
from slime.rollout.state import GenerateState

Status = Sample.Status
END = "<|im_end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_char_tokenizer(tmp_path)
    environments.SEEN.clear()
    return tmp_path


def args_for(engine: FakeEngine, folder: Path, environment: str, **more: Any) -> Any:
    return make_args(
        engine.url,
        hf_checkpoint=str(folder),
        environment_path=f"support.environments.{environment}",
        custom_generate_function_path="slime.environments.generate.generate",
        **({"rollout_max_response_len": 4096, "custom_rm_path": None, "rm_type": None} | more),
    )


def saying(folder: Path, *texts: str) -> Any:
    tokenizer = load_tokenizer(str(folder))

    def reply(payload: Payload, number: int) -> Reply:
        text = texts[number % len(texts)] + END
        return Reply(ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    return reply


def chat(index: int = 7, **more: Any) -> Sample:
    prompt = [{"role": "user", "content": "Play."}]
    return Sample(index=index, group_index=3, prompt=prompt, **more)  # type: ignore[arg-type]


async def run(args: Any, sample: Sample, **more: Any) -> Sample:
    params = GenerateState(args).sampling_params
    [sample] = flatten([await generate_and_rm(args, sample, params, **more)])
    sample.validate()
    return sample


@pytest.mark.parametrize("environment", ["Counting", "AsyncCounting"])
async def test_an_episode_is_the_templates_conversation_and_only_the_models_words_train(
    folder: Path, environment: str
):
    async with fake_engine(saying(folder, "a", "x", "c")) as engine:
        sample = await run(args_for(engine, folder, environment), chat())
    tokenizer = load_tokenizer(str(folder))
    messages = [
        {"role": "user", "content": "Play.\nbegin"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "t1"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "t2"},
        {"role": "assistant", "content": "c"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert tokenizer.decode(sample.tokens) == whole
    written = [
        token
        for token, trains in zip(
            sample.tokens[sample.prompt_length :], sample.loss_mask or [], strict=True
        )
        if trains
    ]
    assert tokenizer.decode(written) == f"a{END}x{END}c{END}"
    assert (sample.status, sample.reward) == (Status.COMPLETED, 2.5)
    episode = sample.metadata["episode"]
    assert episode["actions"] == ["a", "x", "c"]
    assert episode["rewards"] == [0.5, 0.5, 1.5]
    assert (episode["invalid_actions"], episode["terminated"]) == (1, True)
    assert episode["info"] == {"number": 3, "invalid_action": False}
    json.dumps(sample.to_dict())
    assert sample.prompt == [{"role": "user", "content": "Play."}]
    assert sample.usage is not None
    assert (sample.usage["requests"], sample.usage["tool_calls"]) == (3, 3)
    threads = {call[-1] for call in environments.SEEN}
    assert len(threads) == 1
    assert environments.SEEN[-1][0] == "close"


async def test_a_group_plays_one_episode_and_another_group_another(folder: Path):
    async with fake_engine(saying(folder, "a")) as engine:
        args = args_for(engine, folder, "Counting")
        params = GenerateState(args).sampling_params
        await generate_and_rm_group(args, [chat(0), chat(1)], params)
        await generate_and_rm_group(args, [chat(2, metadata={"seed": 5})], params)
        await run(args, chat(0), evaluation=True)
        other = chat(3)
        other.group_index = 4
        await run(args, other)
    seeds = [call[1] for call in environments.SEEN if call[0] == "reset"]
    assert seeds[0] == seeds[1]
    assert seeds[2] == 5
    assert len(set(seeds)) == 4


async def test_text_prompts_are_told_text(folder: Path):
    async with fake_engine(saying(folder, "a")) as engine:
        args = args_for(engine, folder, "Counting", environment_args={"turns": 1})
        sample = Sample(
            index=1, prompt="Go: ", tokens=[1, 2], metadata={"environment_args": {"turns": 2}}
        )
        sample = await run(args, sample)
    text = load_tokenizer(str(folder)).decode(sample.tokens)
    assert text == f"Go: begina{END}t1a{END}"


@pytest.mark.parametrize(
    ("environment", "more", "status", "reward"),
    [
        ("CutShort", {}, Status.TRUNCATED, 0.25),
        ("Counting", {"environment_max_turns": 2}, Status.TRUNCATED, 1.0),
        ("Counting", {"rollout_max_response_len": 20}, Status.TRUNCATED, 0.5),
        ("Unjudged", {"custom_rm_path": "support.rollout_plugins.constant_reward"}, None, 1.0),
    ],
)
async def test_limits_keep_the_rewards_so_far(
    folder: Path, environment: str, more: dict[str, Any], status: Status | None, reward: float
):
    async with fake_engine(saying(folder, "a")) as engine:
        sample = await run(args_for(engine, folder, environment, **more), chat())
    assert sample.status is (status or Status.COMPLETED)
    assert sample.reward == reward


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("make", "(toy): be made raised OSError: no board"),
        ("reset", "(toy): reset raised OSError: no board"),
        ("raise", "(toy): step raised ZeroDivisionError: no board"),
        ("exit", "SystemExit(3)"),
        ("stop", "StopIteration()"),
        ("hang", "(toy): step gave no answer within 0.2 s"),
        ("nan", "a reward is a finite number or None, found nan"),
        ("text", "step() returns a slime.environments.Step, found 'no step'"),
        ("observation", "an observation is text or a list of messages, found 7"),
    ],
)
async def test_what_an_environment_does_wrong_fails_its_sample_by_name(
    folder: Path, how: str, error: str
):
    settings = {"id": "toy", "how": how}
    async with fake_engine(saying(folder, "a")) as engine:
        args = args_for(
            engine, folder, "Failing", environment_args=settings, environment_timeout_s=0.2
        )
        sample = await asyncio.wait_for(run(args, chat()), 10)
        assert sample.status is Status.FAILED
        assert error in sample.metadata["error"]
        metrics = sample_metrics([sample], args)
    assert metrics["error_cat/environment"] == 1
    assert sample.tokens
    assert sample.effective_response_length == 0


async def test_an_error_at_the_end_loses_no_episode(folder: Path):
    settings = {"how": "close"}
    async with fake_engine(saying(folder, "a")) as engine:
        args = args_for(engine, folder, "Failing", environment_args=settings)
        sample = await run(args, chat())
    assert (sample.status, sample.reward) == (Status.COMPLETED, 1.0)


@pytest.mark.parametrize("environment", ["Counting", "Forgetful"])
async def test_a_cut_episode_goes_on_where_it_was_if_it_can_be_repeated(
    folder: Path, environment: str
):
    say = saying(folder, "a", "b")

    def reply(payload: Payload, number: int) -> Reply:
        ids = say(payload, number).ids
        return Reply(ids=ids[:1], hold=True) if number == 1 else Reply(ids=ids)

    async with fake_engine(reply) as engine:
        args = args_for(engine, folder, environment, partial_rollout=True)
        state = GenerateState(args)
        state.start_round(0)
        task = asyncio.create_task(run(args, chat()))
        await engine.holds(1)
        state.aborted = True
        await state.client.post("/abort_request", {"abort_all": True})
        sample = await asyncio.wait_for(task, 10)
        assert (sample.status, sample.reward) == (Status.ABORTED, None)
        before = list(sample.tokens)
        sample = Sample.from_dict(json.loads(json.dumps(sample.to_dict())))  # a checkpoint
        state.start_round(1)
        sample = await run(args, sample)
    assert sample.status is Status.COMPLETED
    episode = sample.metadata["episode"]
    goes_on = environment == "Counting"
    assert (sample.tokens[: len(before)] == before) == goes_on
    assert episode["restarts"] == (0 if goes_on else 1)
    assert sample.metadata["round_number"] == len(episode["actions"]) == 3
    # a, then b, which was cut after its first token and went on with "a" and the end.
    assert episode["actions"][:2] == (["a", "ba"] if goes_on else ["a", "b"])
    assert sum(call[0] == "close" for call in environments.SEEN) == (2 if goes_on else 3)


async def test_bad_rows_fail_and_no_environment_stops_the_run(folder: Path):
    async with fake_engine(saying(folder, "a")) as engine:
        args = args_for(engine, folder, "Counting")
        for metadata in ({"seed": -1}, {"seed": "4"}, {"environment_args": [1]}):
            sample = await run(args, chat(metadata=metadata))
            assert sample.status is Status.FAILED
            assert DataError.__name__ in sample.metadata["error"]
        args.environment_path = None
        with pytest.raises(ConfigError, match="--environment-path"):
            await run(args, chat())
