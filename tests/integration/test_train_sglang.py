"""train.py with stock SGLang servers on a CPU: two of them on the slots of two training ranks."""

from collections.abc import Callable

import pytest
from support.engine_server import SGLANG_CPU, SGLANG_STAND_INS
from support.train_runs import Run

pytestmark = pytest.mark.sglang

GRPO = (
    "--rollout-engine sglang --colocate --actor-num-gpus-per-node 2 --hf-checkpoint {work}/model "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label --apply-chat-template "
    "--rollout-shuffle --rm-type random --num-rollout 3 --rollout-batch-size 8 --n-samples-per-prompt 4 "
    "--global-batch-size 32 --rollout-max-response-len 8 --use-dynamic-batch-size --max-tokens-per-gpu 512 "
    "--advantage-estimator grpo --lr 1e-2 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
    "--save {work}/sglang-checkpoints --save-interval 2 --sglang-max-total-tokens 4096 "
    "--sglang-max-running-requests 16 --update-weight-buffer-size 200000 "
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train("sglang", GRPO, paths=(SGLANG_STAND_INS, SGLANG_CPU))


def test_three_rounds_run_to_the_end(run: Run) -> None:
    assert run.code == 0, run.output[-3000:]
    assert len(run.series("rollout/raw_reward")) == 3
    assert min(run.series("train/grad_norm")) > 1e-3


def test_engines_have_the_weights_that_the_trainer_has_after_every_step(run: Run) -> None:
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5


def test_both_sides_leave_and_return_in_each_round_and_for_a_checkpoint(run: Run) -> None:
    log = (run.folder / "logs" / "engine-0.log").read_text()
    # At the start and in three rounds for the trainer, whose turn ends in two steps; two saves.
    assert log.count('POST /release_memory_occupation HTTP/1.1" 200') == 1 + 3 + 2
    assert log.count('POST /resume_memory_occupation HTTP/1.1" 200') == 2 * (1 + 3) + 2
    sleeps = (run.folder / "logs" / "train-rank-0.log").read_text().count("the trainer sleeps")
    assert sleeps == 1 + 3 + 2


def test_every_sync_was_verified(run: Run) -> None:
    assert len(run.series("perf/update_weights_verify_time")) == 3


def test_each_engine_got_each_sync_in_one_request(run: Run) -> None:
    for number in range(2):
        log = (run.folder / "logs" / f"engine-{number}.log").read_text()
        # To note what it loaded, before the first round, after each of three, and a goodbye.
        assert log.count('POST /update_weights_from_tensor HTTP/1.1" 200') == 6
