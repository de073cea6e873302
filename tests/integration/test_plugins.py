"""Plugins as users write them (tests/support/user_plugins) on real engines, up to the training batches."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import save_scripted_model

from slime.data.sample import Sample
from slime.observability.metrics import unknown_names

Status = Sample.Status
PLUGINS = "support.user_plugins"
CALL = '<tool_call>{"args": [2, 3]}</tool_call>'
SCRIPT = {
    "\n": ["<search>moon</search>", "<answer>green</answer>", CALL],
    "</information>": ["<answer>cheese</answer>"],
    "judge:": ["<answer>cheese</answer>"],
    CALL: [CALL, "<|im_end|>"],
    "</tool_response>": ["<|im_end|>"],
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    model = save_scripted_model(tmp_path_factory.mktemp("model"), SCRIPT)
    with live_rollout(model, tmp_path_factory.mktemp("logs"), num_engines=2) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "label": "cheese"} for i in range(8)]
    return write_prompts(tmp_path / "prompts.jsonl", rows)


def check_alignment(sample: Sample) -> None:
    """Masked tokens have log-prob 0.0, the others that of the script; tokens spell the response."""
    mask = sample.loss_mask or [1] * sample.response_length
    assert len(mask) == len(sample.rollout_log_probs or ()) == sample.response_length
    for trains, log_prob in zip(mask, sample.rollout_log_probs or (), strict=True):
        assert trains or log_prob == 0.0
        assert -2.0 < log_prob <= 0.0


def test_search_in_several_turns_with_text(live: LiveRollout, prompts: Path):
    run = live.run(
        prompts,
        f"--custom-generate-function-path {PLUGINS}.search_r1.generate "
        f"--custom-rm-path {PLUGINS}.search_r1.reward_func "
        f"--dynamic-sampling-filter-path {PLUGINS}.search_r1.keep_if_rewards_differ "
        "--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 --log-multi-turn",
    )
    result = run.generate()
    assert len(result.samples) == 16
    assert {sample.reward for sample in result.samples} >= {0.2, 1.0}
    searched = [sample for sample in result.samples if "<information>" in sample.response]
    assert searched
    for sample in result.samples:
        check_alignment(sample)
        decoded = run_decode(live, sample)
        assert decoded == sample.response
    for sample in searched:
        assert sample.usage is not None
        assert sample.usage["requests"] >= 2
        assert sample.usage["other_time_s"] >= 0.01
        assert sample.non_generation_time == sample.usage["other_time_s"]
    (batch,) = result.batches
    masked = sum(mask.count(0) for mask in ((s.loss_mask or []) for s in result.samples))
    assert int((batch.loss_masks.values == 0).sum()) == masked > 0
    assert result.metrics["rollout/usage/requests/max"] >= 2
    assert not unknown_names(result.metrics)


def run_decode(live: LiveRollout, sample: Sample) -> str:
    from slime.utils.processing_utils import load_tokenizer

    tokenizer = load_tokenizer(str(live.model), trust_remote_code=True)
    return tokenizer.decode(sample.tokens[-sample.response_length :])


def test_samples_of_a_group_differ_and_a_run_repeats_them(live: LiveRollout, prompts: Path):
    flags = (
        f"--custom-generate-function-path {PLUGINS}.search_r1.generate "
        f"--custom-rm-path {PLUGINS}.search_r1.reward_func --n-samples-per-prompt 16 "
        "--global-batch-size 32"
    )
    first, again = (live.run(prompts, flags).generate() for _ in range(2))
    assert [sample.tokens for sample in first.samples] == [s.tokens for s in again.samples]
    assert len({sample.response for sample in first.samples[:16]}) > 2


def test_tool_calls_with_token_ids(live: LiveRollout, prompts: Path):
    run = live.run(
        prompts,
        f"--custom-generate-function-path {PLUGINS}.tool_loop.generate --rm-type random "
        f"--rollout-sample-hook-path {PLUGINS}.tool_loop.tag "
        f"--rollout-sample-filter-path {PLUGINS}.tool_loop.remove_long "
        "--router-policy consistent_hashing --n-samples-per-prompt 8 --global-batch-size 16",
    )
    result = run.generate(3)
    assert {sample.metadata["tagged_in"] for sample in result.samples} == {3}
    called = [sample for sample in result.samples if "<tool_response>" in sample.response]
    assert called
    for sample in result.samples:
        check_alignment(sample)
        assert sample.metadata["round_number"] == len(sample.weight_versions)
        assert sample.remove_sample == (sample.response_length > 100)
    sample = called[0]
    assert "<tool_response>5</tool_response>" in sample.response
    assert sample.usage is not None
    assert sample.usage["tokens_in"] == sample.prefix_cache_info.total_prompt_tokens
    assert sample.usage["tokens_out"] == sample.effective_response_length
    assert "was_evaluation" not in sample.metadata


def test_agents_fan_out_into_samples_of_one_execution(live: LiveRollout, prompts: Path):
    run = live.run(
        prompts,
        f"--custom-generate-function-path {PLUGINS}.multi_agent.generate_with_multi_agents "
        f"--custom-rm-path {PLUGINS}.judge.plain --rollout-max-context-len 128 --log-passrate",
    )
    result = run.generate()
    assert len(result.samples) == 12  # 2 prompts x 2 executions x 3 agents
    assert len({sample.rollout_id for sample in result.samples}) == 4
    for group in result.output.samples:
        for execution in group:
            assert isinstance(execution, list)
            assert [agent.usage is not None for agent in execution] == [True, False, False]
            assert execution[0].usage is not None
            assert execution[0].usage["requests"] == 3
    (batch,) = result.batches
    assert batch.steps[0].num_rollouts == 4
    # Agents that ask the same at the same time are not bound to answer the same.
    pairs = [(e[0].response, e[1].response) for g in result.output.samples for e in g]
    assert any(one != other for one, other in pairs)


@pytest.mark.parametrize(
    ("flags", "rewards"),
    [
        (f"--group-rm --custom-rm-path {PLUGINS}.judge.group_rm", {0.0, 1.0}),
        (f"--custom-rm-path {PLUGINS}.judge.plain", {0.0, 1.0}),
        (f"--custom-rm-path {PLUGINS}.judge.both --reward-key score", {0.0}),
        (f"--group-rm --custom-rm-path {PLUGINS}.judge.both --reward-key score", {0.0}),
    ],
)
def test_rewards(live: LiveRollout, prompts: Path, flags: str, rewards: set[float]):
    result = live.run(prompts, flags).generate()
    assert {s.status for s in result.samples} == {Status.COMPLETED}
    assert set(result.batches[0].raw_rewards) <= rewards


def test_data_source_from_scratch(live: LiveRollout, prompts: Path, tmp_path: Path):
    flags = (
        f"--data-source-path {PLUGINS}.own_data.Sums --rm-type random --over-sampling-batch-size 4 "
        f"--save {tmp_path}"
    )
    run = live.run(prompts, flags)
    first = run.generate(0)
    kept = {sample.label for sample in first.samples}
    back = {group[0].label for group in run.data_source.returned}
    assert kept | back == {"1", "3", "5", "7"}
    assert len(kept) == len(back) == 2
    run.data_source.save(0)
    resumed = live.run(prompts, flags)
    resumed.args.load = str(tmp_path)  # as after a checkpoint, of which there is none here
    resumed.data_source.load(0)
    assert resumed.data_source.next == 4


def test_data_source_on_top_of_ours_with_a_buffer_filter(live: LiveRollout, prompts: Path):
    run = live.run(
        prompts,
        f"--data-source-path {PLUGINS}.own_data.Replaying "
        f"--buffer-filter-path {PLUGINS}.own_data.newest_first "
        f"--rollout-all-samples-process-path {PLUGINS}.own_data.put_back_failures "
        f"--custom-rm-path {PLUGINS}.search_r1.reward_func",
    )
    for rollout_id in range(4):
        run.generate(rollout_id)
    seen = run.data_source.metadata["seen"]
    again = [index for index in seen if seen.count(index) > 1]
    assert len(seen) == 8
    assert again, "no group had only zero rewards, so none came back"
    json.dumps(run.data_source.state_dict())


@pytest.mark.parametrize("name", ["generate_rollout", "legacy_generate_rollout"])
def test_whole_rounds_of_ones_own(live: LiveRollout, prompts: Path, name: str):
    run = live.run(
        prompts, f"--rollout-function-path {PLUGINS}.own_rollout.{name} --rm-type random"
    )
    result = run.generate(1)
    assert [sample.index for sample in result.samples] == [0, 1, 2, 3]
    assert result.metrics.get("own/rounds") == (2 if name == "generate_rollout" else None)
    if name == "generate_rollout":
        output, metrics = run.evaluate(1)
        assert output.metrics == {"eval/own": 1.0}
        assert 0.0 <= metrics["eval/mine"] <= 1.0


def test_evaluation_of_ones_own_with_the_run_s_datasets(live: LiveRollout, prompts: Path):
    run = live.run(
        prompts,
        f"--eval-function-path {PLUGINS}.own_rollout.evaluate_all --eval-interval 1 "
        f"--eval-prompt-data tools {prompts}@[0:3] --n-samples-per-eval-prompt 2 "
        f"--custom-generate-function-path {PLUGINS}.tool_loop.generate --rm-type random",
    )
    output, metrics = run.evaluate()
    samples = output.data["tools"]["samples"]
    assert len(samples) == 6
    assert all(sample.metadata["was_evaluation"] for sample in samples)
    assert metrics["eval/tools/usage/requests/min"] >= 1
    assert not unknown_names(metrics)


def test_columns_and_rewards_of_ones_own(live: LiveRollout, prompts: Path, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(f"notes: {tmp_path / 'notes'}\n")
    common = f"--custom-rm-path {PLUGINS}.search_r1.reward_func --custom-config-path {tmp_path}/own.yaml "
    converted = live.run(
        prompts,
        common
        + f"--custom-convert-samples-to-train-data-path {PLUGINS}.train_side.convert_samples",
    ).generate()
    (batch,) = converted.batches
    assert sum(batch.rewards) == pytest.approx(0.0)
    assert batch.extras["round_number"] == [1, 1, 1, 1]
    assert (tmp_path / "notes" / "convert_samples.jsonl").exists()
    processed = live.run(
        prompts,
        common + f"--custom-reward-post-process-path {PLUGINS}.train_side.post_process_rewards",
    ).generate()
    (batch,) = processed.batches
    assert list(batch.raw_rewards) == [s.reward for s in processed.samples]
    assert sum(batch.rewards) == pytest.approx(0.0)
