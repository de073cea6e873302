"""Several turns on real engines: the tokens and log-probs of the model, and what tools said, to the token."""

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import VOCAB_SIZE, save_random_model, save_scripted_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.data.sample import Sample

Status = Sample.Status
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
BAD = "<tool_call>{add}</tool_call>"
# Between one and many calls, good and bad ones, then an answer.
SCRIPT = {"\n": [ADD, BAD, "5!"], ADD: [ADD, "<|im_end|>"], BAD: ["<|im_end|>", ADD]}
# fp32 on both sides; the engine reads the conversation in pieces.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    model = save_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPT)
    with live_rollout(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    folder = save_random_model(tmp_path_factory.mktemp("random"))
    with live_rollout(folder, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "label": "5"} for i in range(8)]
    return write_prompts(tmp_path / "prompts.jsonl", rows)


def flags(function: str, more: str = "") -> str:
    path = f"--custom-generate-function-path {function}"
    return f"{path} --rm-type random --n-samples-per-prompt 8 --global-batch-size 16 {more}"


def messages_of(sample: Sample, tokenizer: Any) -> list[dict[str, str]]:
    """The conversation, read back from the runs of the mask."""
    text = tokenizer.decode(sample.tokens)
    parts = text.split("<|im_start|>")[1:]
    turns = [part.split("\n", 1) for part in parts]
    return [{"role": role, "content": body.split("<|im_end|>")[0]} for role, body in turns]


def test_parallel_tool_calls_are_told_back_as_the_template_writes_them(
    scripted: LiveRollout, prompts: Path
):
    more = "--log-multi-turn --rollout-max-response-len 400 --max-tokens-per-gpu 1024"
    run = scripted.run(prompts, flags("support.turn_functions.calculator", more))
    result = run.generate()
    tokenizer = AutoTokenizer.from_pretrained(scripted.model)
    call_ids = tokenizer.convert_tokens_to_ids([ADD, BAD])
    called = [sample for sample in result.samples if sample.metadata["round_number"] > 1]
    assert any(ADD + ADD in sample.response for sample in called)
    assert any(BAD in sample.response for sample in called)
    for sample in result.samples:
        conversation = messages_of(sample, tokenizer)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False).removesuffix("\n")
        assert tokenizer.decode(sample.tokens) == whole
        # This tokenizer would write a call in other tokens than the model does: they were kept.
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert (sample.tokens == ids) == ("<tool_call>" not in sample.response)
        mask = sample.loss_mask or [1] * sample.response_length
        said = zip(sample.tokens[sample.prompt_length :], mask, strict=True)
        calls = [trains for token, trains in said if token in call_ids]
        assert len(calls) == sample.response.count("<tool_call>")
        assert all(calls)
    sample = next(sample for sample in called if ADD + ADD in sample.response)
    told = [m["content"] for m in messages_of(sample, tokenizer) if m["role"] == "tool"]
    assert told.count("5") >= 2
    metrics = result.metrics
    assert metrics["rollout/usage/tool_calls/max"] >= 2
    assert 0 < metrics["rollout/usage/tool_error_ratio"] < 1
    assert metrics["multi_turn/multi_turn_metric/round_number_max"] <= 5
    assert metrics["perf/non_generation_time/max"] >= 0.01


@pytest.mark.parametrize(
    "function",
    [
        "support.turn_functions.three_turns",
        "support.turn_functions.debate",
        "support.user_plugins.multi_agent.generate_with_multi_agents",
    ],
)
def test_log_probs_are_those_of_one_pass_over_the_whole_sample(
    random_model: LiveRollout, prompts: Path, function: str
):
    more = "--rollout-max-response-len 96" if function.endswith("three_turns") else ""
    result = random_model.run(prompts, flags(function, more)).generate()
    model = AutoModelForCausalLM.from_pretrained(random_model.model, dtype=torch.float32).eval()
    several = 0
    for sample in result.samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.tokens])).logits[0, :, :VOCAB_SIZE]
        expected = torch.log_softmax(logits, -1)[:-1]
        ids = torch.tensor(sample.tokens[1:])[:, None]
        expected = expected.gather(1, ids)[-sample.response_length :, 0]
        mask = torch.tensor(sample.loss_mask or [1] * sample.response_length)
        found = torch.tensor(sample.rollout_log_probs)
        assert torch.allclose(found * mask, expected * mask, atol=TOLERANCE, rtol=0)
        assert bool((found[mask == 0] == 0).all())
        several += sample.usage is not None and sample.usage["requests"] > 1
    assert several


def test_partial_rollouts_go_on_in_the_turn_they_were_cut_in(
    random_model: LiveRollout, prompts: Path
):
    run = random_model.run(
        prompts,
        flags(
            "support.turn_functions.three_turns",
            "--partial-rollout --over-sampling-batch-size 6 --rollout-max-response-len 96",
        ),
    )
    rounds = [run.generate(rollout_id) for rollout_id in range(4)]
    samples = [sample for result in rounds for sample in result.samples]
    assert any("start_rollout_id" in sample.metadata for sample in samples)
    for sample in samples:
        assert sample.metadata["round_number"] <= 3
        told = [int(number) for number in re.findall(r" \[(\d)\] ", sample.response)]
        assert told == list(range(1, len(told) + 1)), sample.response
