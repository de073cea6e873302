"""Agents on the clients of OpenAI's and Anthropic's packages, on real engines behind the real router."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agent_world import ADD, END, TEMPLATE, checked, trained_text
from support.agents import MAX_TURNS
from support.engine_server import sglang_spec
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import VOCAB_SIZE, save_random_model, save_scripted_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.data.sample import Sample
from slime.engines.servers import ServerSpec

Status = Sample.Status
BAD = "<tool_call>{add}</tool_call>"
# One call or several, one that is none, then an answer. ADD is a single token here, and nine or more
# when its text is tokenised.
SCRIPT = {"\n": [ADD, BAD, "5!"], ADD: [ADD, END], BAD: [END]}
# fp32 on both sides; the engine reads the conversation in pieces.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    folder = tmp_path_factory.mktemp("scripted")
    model = save_scripted_model(folder, SCRIPT, chat_template=TEMPLATE, context=1024)
    with live_rollout(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    folder = save_random_model(tmp_path_factory.mktemp("random"), chat_template=TEMPLATE)
    with live_rollout(folder, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i}?"}], "label": "5"} for i in range(8)
    ]
    return write_prompts(tmp_path / "prompts.jsonl", rows)


def flags(agent: str, more: str = "") -> str:
    return (
        f"--agent-function-path support.agents.{agent} --rm-type random --n-samples-per-prompt 8 "
        "--global-batch-size 16 --rollout-max-response-len 500 "
        f"--max-tokens-per-gpu 1024 --log-multi-turn {more}"
    )


@pytest.mark.parametrize("agent", ["calculator", "claude_calculator"])
def test_calls_are_read_and_results_told_back(scripted: LiveRollout, prompts: Path, agent: str):
    _check_calculator(scripted, prompts, agent)


@pytest.mark.sglang
def test_stock_sglang_answers_agents_as_well(
    tmp_path_factory: pytest.TempPathFactory, prompts: Path
):
    folder = tmp_path_factory.mktemp("scripted")
    model = save_scripted_model(folder, SCRIPT, chat_template=TEMPLATE, context=1024)
    logs = tmp_path_factory.mktemp("logs")

    def spec(model: Path, logs: Path) -> ServerSpec:
        return sglang_spec(
            model, logs, "--max-running-requests", "16", "--max-total-tokens", "65536"
        )

    with live_rollout(model, logs, make_spec=spec) as running:
        _check_calculator(running, prompts, "claude_calculator")


def _check_calculator(running: LiveRollout, prompts: Path, agent: str) -> None:
    # One in nine samples calls in two turns: SGLang draws without seeds, and among 64 there is one.
    more = "--rollout-batch-size 8 --global-batch-size 64"
    result = running.run(prompts, flags(agent, more)).generate()
    tokenizer: Any = AutoTokenizer.from_pretrained(running.model)
    several = 0
    for sample in checked(result.samples):
        assert sample.status is Status.COMPLETED
        text = tokenizer.decode(sample.tokens)
        turns = text.count("<|im_start|>assistant")
        several += turns > 2
        assert sample.metadata["round_number"] == turns
        # The agent gives up after so many turns, and leaves the calls of its last one unanswered.
        before_last, _, last = text.rpartition("<|im_start|>assistant")
        answered = before_last.count(ADD)
        assert turns == MAX_TURNS or ADD not in last
        assert text.count("<|im_start|>tool\n5<|im_end|>") == answered
        assert set(trained_text(sample, tokenizer).replace(END, "\n").replace(ADD, "").split()) <= {
            "5!",
            BAD,
        }
        call = tokenizer.convert_tokens_to_ids(ADD)
        assert sample.tokens.count(call) == text.count(ADD)  # never tokenised again
        assert sample.usage is not None
        assert sample.usage["requests"] == turns
        assert sample.usage["tool_calls"] == answered
    assert several
    assert result.metrics["rollout/usage/requests/mean"] > 1


@pytest.mark.runs
def test_log_probs_are_those_of_one_pass_over_each_branch(random_model: LiveRollout, prompts: Path):
    result = random_model.run(prompts, flags("branching")).generate()
    model = AutoModelForCausalLM.from_pretrained(random_model.model, dtype=torch.float32).eval()
    by_execution: dict[int | None, list[Sample]] = {}
    for sample in checked(result.samples):
        by_execution.setdefault(sample.rollout_id, []).append(sample)
        with torch.no_grad():
            logits = model(torch.tensor([sample.tokens])).logits[0, :, :VOCAB_SIZE]
        expected = torch.log_softmax(logits, -1)[:-1]
        ids = torch.tensor(sample.tokens[1:])[:, None]
        expected = expected.gather(1, ids)[-sample.response_length :, 0]
        mask = torch.tensor(sample.loss_mask or [1] * sample.response_length)
        found = torch.tensor(sample.rollout_log_probs)
        assert torch.allclose(found * mask, expected * mask, atol=TOLERANCE, rtol=0)
        assert bool((found[mask == 0] == 0).all())
    assert len(by_execution) == 16
    for siblings in by_execution.values():
        assert len(siblings) == 2
        assert siblings[0].usage is not None
        written = sum(sum(part.loss_mask or []) for part in siblings)
        assert written == siblings[0].usage["tokens_out"]  # each token once
    # The same seed writes the same tokens again, whatever came first.
    again = random_model.run(prompts, flags("branching")).generate()
    assert sorted(map(_key, again.samples)) == sorted(map(_key, result.samples))


def _key(sample: Sample) -> tuple[int | None, list[int]]:
    return sample.index, sample.tokens


@pytest.mark.runs
def test_a_round_that_is_full_ends_its_agents(random_model: LiveRollout, prompts: Path):
    more = "--over-sampling-batch-size 6 --partial-rollout"
    run = random_model.run(prompts, flags("branching", more))
    for rollout_id in range(3):
        result = run.generate(rollout_id)
        assert len({sample.group_index for sample in result.samples}) == 2
        for sample in checked(result.samples):
            assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
