import json
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.config.evaluation import EvalDataset
from slime.data.sample import Sample
from slime.errors import DeadlineExceeded, EngineError
from slime.rollout.evaluate import eval_rollout, eval_sampling_params
from slime.rollout.seeds import sampling_seed

PLUGINS = "support.rollout_plugins"


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """Overrides for make_args: a tokenizer and two datasets of three and two prompts."""
    for name, size in (("a", 3), ("b", 2)):
        rows = [json.dumps({"input": f"{name}{i}", "answer": str(i)}) for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return {
        "hf_checkpoint": make_char_tokenizer(tmp_path / "tokenizer"),
        "label_key": "answer",
        "eval_datasets": [
            EvalDataset(
                name="a", path=str(tmp_path / "a.jsonl"), n_samples_per_eval_prompt=2, top_k=5
            ),
            EvalDataset(
                name="b",
                path=str(tmp_path / "b.jsonl"),
                temperature=0.0,
                max_response_len=2,
                custom_rm_path=f"{PLUGINS}.index_reward",
                metadata_overrides={"level": "hard"},
            ),
        ],
    }


async def test_each_dataset_has_its_own_settings(world: dict[str, Any]):
    async with fake_engine() as engine:
        args = make_args(engine.url, **world)
        output = await eval_rollout(args, 5)
    a, b = output.data["a"], output.data["b"]
    assert a["rewards"] == [1.0] * 6
    assert a["truncated"] == [False] * 6
    assert [s.group_index for s in a["samples"]] == [0, 0, 1, 1, 2, 2]
    assert [s.label for s in a["samples"]] == ["0", "0", "1", "1", "2", "2"]
    assert b["rewards"] == [0.0, 1.0]
    assert b["truncated"] == [True, True]
    assert b["samples"][0].metadata["level"] == "hard"
    asked = [r["sampling_params"] for r in engine.requests]
    assert sorted(p["temperature"] for p in asked) == [0.0] * 2 + [1.0] * 6
    assert {p["sampling_seed"] for p in asked if p["temperature"] == 0.0} == {
        sampling_seed(42, "eval/b", index) for index in (0, 1)
    }


async def test_two_evaluations_draw_the_same_numbers_and_read_the_files_once(
    world: dict[str, Any], tmp_path: Path
):
    async with fake_engine() as engine:
        args = make_args(engine.url, **world)
        first = await eval_rollout(args, 0)
        (tmp_path / "a.jsonl").unlink()
        second = await eval_rollout(args, 1)
    for name in ("a", "b"):
        tokens = [[s.tokens for s in out.data[name]["samples"]] for out in (first, second)]
        assert tokens[0] == tokens[1]


async def test_group_reward_works_in_evaluation(world: dict[str, Any]):
    world["eval_datasets"] = world["eval_datasets"][:1]
    async with fake_engine() as engine:
        args = make_args(
            engine.url, group_rm=True, **world | {"custom_rm_path": f"{PLUGINS}.group_reward"}
        )
        output = await eval_rollout(args, 0)
    assert output.data["a"]["rewards"] == [0.0, 1.0] * 3


async def test_failed_sample_counts_as_zero(world: dict[str, Any]):
    world["eval_datasets"] = world["eval_datasets"][:1]
    async with fake_engine(
        lambda payload, number: Reply(status=500 if number == 0 else 200)
    ) as engine:
        output = await eval_rollout(make_args(engine.url, **world), 0)
    assert sorted(output.data["a"]["rewards"]) == [0.0] + [1.0] * 5
    statuses = [s.status for s in output.data["a"]["samples"]]
    assert statuses.count(Sample.Status.FAILED) == 1


async def test_dataset_of_failures_stops_with_the_cause(world: dict[str, Any]):
    async with fake_engine(lambda payload, number: Reply(status=500)) as engine:
        with pytest.raises(EngineError, match=r"evaluation of [ab]: all \d samples failed"):
            await eval_rollout(make_args(engine.url, **world), 0)


async def test_deadline_names_the_datasets(world: dict[str, Any]):
    async with fake_engine(lambda payload, number: Reply(hold=True)) as engine:
        args = make_args(engine.url, rollout_timeout_s=0.1, **world)
        with pytest.raises(DeadlineExceeded, match=r"evaluation 2 of a, b was not done within"):
            await eval_rollout(args, 2)


def test_dataset_goes_before_eval_flags_before_rollout_flags():
    args = make_args("http://127.0.0.1:1", eval_temperature=0.6, eval_top_p=0.9)
    dataset = EvalDataset(name="x", path="x", temperature=0.0, stop=("a",), min_new_tokens=2)
    params = eval_sampling_params(args, dataset)
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.0, 0.9, -1)
    assert (params["stop"], params["min_new_tokens"]) == (["a"], 2)
    assert params["max_new_tokens"] == 16
