"""train.py from end to end on a CPU: Ray, router, two engines, Megatron, weight sync, checkpoint, resume."""

import json
from collections.abc import Callable

import pytest
from support.slow_phases import GENERATE_S, TRAIN_S
from support.train_runs import ROOT, Run, assert_side_adds_up, phases_of

GRPO = (
    "--hf-checkpoint {work}/model --rollout-num-gpus 2 --prompt-data {work}/data/train.jsonl --input-key prompt "
    "--label-key label --apply-chat-template --rollout-shuffle --rm-type random "
    "--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 8 --rollout-max-response-len 8 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 256 --advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.01 "
    "--kl-loss-type low_var_kl --lr 1e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
)


@pytest.fixture(scope="module")
def first(train: Callable[..., object]) -> object:
    """Two rounds of GRPO with evaluation, checkpoints and a dump of the rollouts."""
    return train(
        "first",
        GRPO
        + "--num-rollout 2 --save {work}/ckpt --save-interval 1 --save-hf {work}/hf-{{rollout_id}} "
        "--eval-interval 1 --eval-prompt-data held_out {work}/data/held_out.jsonl --eval-temperature 0 "
        "--eval-max-response-len 8 --use-tensorboard --save-debug-rollout-data {work}/dump-{{rollout_id}}.jsonl "
        "--over-sampling-batch-size 6",
    )


def test_two_rounds_run_to_the_end(first) -> None:
    assert first.code == 0, first.output[-3000:]
    assert len(first.series("rollout/raw_reward")) == 2
    assert len(first.series("train/loss")) == 4  # 16 samples a round, 8 a step
    assert len(first.series("eval/held_out")) == 3  # before, and after each round


def test_trainer_and_engines_agree_on_every_step(first) -> None:
    assert max(first.series("train/train_rollout_logprob_abs_diff")[::2]) < 1e-4


def test_weights_changed_and_every_sync_was_verified(first, work) -> None:
    assert len(first.series("perf/update_weights_verify_time")) == 2
    before, after = (work.path / name / "model.safetensors" for name in ("hf-0", "hf-1"))
    assert before.read_bytes() != after.read_bytes()


def test_run_folder_holds_config_metrics_samples_and_checkpoints(first, work) -> None:
    config = json.loads((first.folder / "config.json").read_text())
    assert config["rollout_batch_size"] == 4
    assert list((first.folder / "tensorboard").iterdir())
    sample = json.loads((first.folder / "samples" / "0.jsonl").read_text().splitlines()[0])
    assert sample["response_length"] >= 1
    assert (work.path / "ckpt" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert (work.path / "hf-1" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def resumed(first, train) -> Run:
    """Two more rounds by the one-step-off driver; generation and each optimizer step take a while."""
    run = train(
        "resumed",
        GRPO
        + "--rollout-num-gpus 1 --num-rollout 4 --load {work}/ckpt --override-opt-param-scheduler "
        "--custom-generate-function-path support.slow_phases.generate "
        "--custom-megatron-before-train-step-hook-path support.slow_phases.before_train_step",
        script="train_async.py",
        paths=(ROOT / "tests",),
    )
    assert run.code == 0, run.output[-3000:]
    return run


@pytest.mark.runs
def test_the_one_step_off_driver_resumes_from_the_checkpoint(resumed) -> None:
    assert resumed.series("rollout/step") == [2, 3]
    assert len(resumed.series("rollout/raw_reward")) == 2


@pytest.mark.runs
def test_a_generation_beside_the_training_is_the_engines_time_not_the_drivers(resumed) -> None:
    # In this row the first generation was waited for, and the second went on beside two steps.
    driver, engines = (phases_of(resumed, side)[0] for side in ("round", "engines"))
    assert engines["generate"] >= 2 * GENERATE_S
    assert driver["train"] >= 2 * TRAIN_S
    assert driver["generate"] <= engines["generate"] - 0.9 * GENERATE_S
    assert sum(driver.values()) == pytest.approx(resumed.series("perf/round_time")[0])
    for side in ("trainer", "engines"):
        assert_side_adds_up(resumed, side, 0)


@pytest.mark.runs
def test_saved_rollouts_train_without_engines_and_on_two_ranks(first, train) -> None:
    replay = train(
        "replay",
        GRPO
        + "--num-rollout 2 --load-debug-rollout-data {work}/dump-{{rollout_id}}.jsonl "
        + "--actor-num-gpus-per-node 2",
    )
    assert replay.code == 0, replay.output[-3000:]
    # The same data and the same initial weights: the steps are those of the first run's one rank.
    norms = first.series("train/grad_norm")
    assert max(norms) > 1e-3  # coin flips: all of a step may be equal, and its norm is 0
    assert replay.series("train/grad_norm") == pytest.approx(norms, rel=1e-3)


def test_an_unknown_flag_stops_before_anything_starts(train) -> None:
    refused = train("refused", GRPO + "--num-rollout 2 --eps-clipp 0.3")
    assert refused.code != 0
    assert "--eps-clip" in refused.output
    assert "Traceback" not in refused.output
    assert not refused.folder.exists()
