"""train.py with a stock SGLang server on the trainer's slot, and weights through files to a copy on its host."""

from collections.abc import Callable

import pytest
from support.engine_server import SGLANG_CPU, SGLANG_STAND_INS
from support.train_runs import Run, Work

pytestmark = pytest.mark.sglang

GRPO = (
    "--rollout-engine sglang --colocate --hf-checkpoint {work}/model --prompt-data {work}/data/train.jsonl "
    "--input-key prompt --label-key label --apply-chat-template --rollout-shuffle --rm-type random --num-rollout 2 "
    "--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 --rollout-max-response-len 8 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 512 --advantage-estimator grpo --lr 1e-2 "
    "--lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 --sglang-max-total-tokens 4096 "
    "--sglang-max-running-requests 16 --update-weight-transport disk --update-weight-disk-dir {work}/whole "
    "--update-weight-local-checkpoint-dir {work}/host "
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train("sglang-disk", GRPO, paths=(SGLANG_STAND_INS, SGLANG_CPU))


def test_the_engine_has_the_weights_that_the_trainer_has_after_every_step(run: Run) -> None:
    assert run.code == 0, run.output[-3000:]
    assert len(run.series("rollout/raw_reward")) == 2
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5
    assert min(run.series("train/grad_norm")) > 1e-3


def test_each_version_was_loaded_from_files_and_compared_by_the_receiver(run: Run) -> None:
    log = (run.folder / "logs" / "engine-0.log").read_text()
    assert log.count('POST /update_weights_from_disk HTTP/1.1" 200') == 3
    # A note of what it loaded, before its memory goes; then a check of each version.
    assert log.count('POST /update_weights_from_tensor HTTP/1.1" 200') == 1 + 3
    said = (run.folder / "logs" / "train-rank-0.log").read_text()
    assert said.count("compared: what each rank of the engines holds") == 3


def test_the_last_version_stays(run: Run, work: Work) -> None:
    assert [path.name for path in (work.path / "whole").iterdir()] == ["weight_v000003"]
