"""train.py with functions of users at every place: in the rollout, on the way to the trainer, and in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.scripted_model import MODEL_ARGS, save_scripted_model
from support.train_runs import ROOT, Run

from slime.cli.main import main

pytestmark = pytest.mark.runs

PLUGINS = "support.user_plugins"
# The sums of the data source are 1, 3, 5, ...
ANSWERS = [f"<answer>{number}</answer>" for number in (1, 3, 5, 7)]
SCRIPT = {"\n": ["<search>moon</search>", *ANSWERS], "</information>": ANSWERS}
FLAGS = (
    f"{MODEL_ARGS} --hf-checkpoint {{model}} --rollout-num-gpus 1 --prompt-data {{data}} "
    "--input-key prompt --label-key label --apply-chat-template --num-rollout 2 "
    "--rollout-batch-size 2 --n-samples-per-prompt 4 --global-batch-size 8 "
    "--rollout-max-response-len 96 --use-dynamic-batch-size --max-tokens-per-gpu 1024 "
    "--lr 1e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
    "--custom-config-path {data}.yaml "
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plugins")
    rows = [{"prompt": f"What is {i}?", "label": "cheese"} for i in range(8)]
    data = folder / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    notes = folder / "notes"
    Path(f"{data}.yaml").write_text(
        f"notes: {notes}\ntis_upper_bound: 2.0\nrs_lower_bound: 0.5\nrs_upper_bound: 2.0\n"
    )
    return {"model": save_scripted_model(folder / "model", SCRIPT), "data": data, "notes": notes}


def notes(files: dict[str, Path], name: str) -> list[dict[str, Any]]:
    path = files["notes"] / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_search_with_functions_at_every_place(
    train: Callable[..., Run], files: dict[str, Path], tmp_path: Path
):
    side = f"{PLUGINS}.train_side"
    run = train(
        "search",
        (FLAGS + "--log-multi-turn --eval-interval 1 --eval-prompt-data held_out {data}@[0:2] ")
        .replace("{model}", str(files["model"]))
        .replace("{data}", str(files["data"]))
        + f"--custom-generate-function-path {PLUGINS}.search_r1.generate "
        f"--custom-rm-path {PLUGINS}.search_r1.reward_func "
        f"--dynamic-sampling-filter-path {PLUGINS}.search_r1.keep_if_rewards_differ "
        f"--data-source-path {PLUGINS}.own_data.Sums --save {tmp_path}/saved "
        f"--custom-convert-samples-to-train-data-path {side}.convert_samples "
        f"--custom-advantage-function-path {side}.advantages "
        f"--rollout-data-postprocess-path {side}.look_at_rollout_data "
        f"--use-tis --custom-tis-function-path {side}.mismatch_weights "
        f"--custom-megatron-init-path {side}.megatron_init "
        f"--custom-megatron-before-log-prob-hook-path {side}.before_log_prob "
        f"--custom-megatron-before-train-step-hook-path {side}.before_train_step "
        f"--custom-rollout-log-function-path {side}.log_rollout "
        f"--custom-eval-rollout-log-function-path {side}.log_eval",
        paths=[ROOT, ROOT / "tests"],
    )
    assert run.code == 0, run.output[-3000:]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert run.series("train/mis_weight") == pytest.approx([1.0, 1.0], abs=1e-3)
    assert run.series("train/mis_rejected") == [0.0, 0.0]
    assert min(run.series("train/grad_norm")) > 0.0
    assert min(run.series("rollout/usage/requests/mean")) >= 1.0
    assert len(run.series("eval/held_out/usage/tokens_out/mean")) == 3
    data = notes(files, "rollout_data")
    assert [row["rollout_id"] for row in data] == [0, 1]
    assert {"advantages", "log_probs", "loss_masks", "rollout_log_probs"} <= set(data[0]["keys"])
    assert any(row["masked"] for row in data)
    assert [row["step_id"] for row in notes(files, "before_train_step")] == [0, 0]
    assert len(notes(files, "megatron_init")) == 1
    assert len(notes(files, "before_log_prob")) == 2
    assert [row["samples"] for row in notes(files, "log_rollout")] == [8, 8]
    assert [row["names"] for row in notes(files, "log_eval")] == [["held_out"]] * 3
    assert [row["samples"] for row in notes(files, "convert_samples")] == [8, 8]
    assert json.loads((tmp_path / "saved" / "sums_1.json").read_text())["next"] >= 4
    assert main(["ledger", str(run.folder)]) == 0
