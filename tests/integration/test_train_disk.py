"""train.py with weights through files: what changed, to copies that two engines of this host load."""

import json
from collections.abc import Callable

import pytest
from support.train_runs import ROOT, Run, Work

pytestmark = pytest.mark.runs

GRPO = (
    "--hf-checkpoint {work}/model --rollout-num-gpus 2 --prompt-data {work}/data/train.jsonl --input-key prompt "
    "--label-key label --apply-chat-template --rollout-shuffle --rm-type random --num-rollout 2 "
    "--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 --rollout-max-response-len 8 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 256 --advantage-estimator grpo --lr 1e-3 "
    "--lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 --actor-num-gpus-per-node 2 "
    "--update-weight-transport disk --update-weight-disk-dir {work}/versions "
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train(
        "disk",
        GRPO + "--update-weight-mode delta --update-weight-local-checkpoint-dir {work}/local "
        "--update-weight-disk-keep-files "
        "--custom-update-weight-post-write-path support.sync_hooks.note_version",
        paths=(ROOT / "tests",),
    )


def test_engines_have_the_weights_that_the_trainer_has(run: Run) -> None:
    assert run.code == 0, run.output[-3000:]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert min(run.series("train/grad_norm")) > 1e-3


def test_syncs_were_verified_and_tell_how_much_changed(run: Run) -> None:
    assert len(run.series("perf/update_weights_verify_time")) == 2
    density = run.series("perf/update_weights_density")
    assert len(density) == 2  # the first version, before the first round, is whole
    assert all(0 < value < 1 for value in density)


def test_versions_are_kept_and_every_rank_was_told(run: Run, work: Work) -> None:
    folder = work.path / "versions"
    versions = [f"weight_v{number:06d}" for number in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == versions
    told = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in folder.glob("hook-*.jsonl")
    ]
    assert len(told) == 2  # ranks
    for rows in told:
        assert [row["version"] for row in rows] == versions
        assert all(len(row["engines"]) == 2 for row in rows)
        assert all("model.safetensors.index.json" in row["files"] for row in rows)
    assert (work.path / "local" / "weights" / "model.safetensors").is_file()
