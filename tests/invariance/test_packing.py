"""How a round is cut changes no result: packing, micro-batches and ranks, by the real trainer.

Loss, gradient norm and weights of two optimizer steps, against one process with one sample in each
micro-batch.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import cut_cases as cuts
from support.device import possible_ranks, skip_unless_possible
from support.megatron_runs import hf_log_probs, hf_model, trainer_config
from support.parallel_cases import CUT_MODEL
from support.ranks import make_models, result, run_ranks

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and what two ranks left of all their cases."""
    folder = tmp_path_factory.mktemp("cuts")
    make_models(folder, [CUT_MODEL])
    for world_size in possible_ranks([2]):
        run_ranks(
            folder, world_size, [n for n, cut in cuts.CUTS.items() if cut.ranks == world_size]
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def whole(folder: Path, words: str) -> dict[str, Any]:
    """One process, one sample in each micro-batch."""
    return cuts.run_cut(folder / CUT_MODEL, words)


@pytest.mark.parametrize("per_token", ["", cuts.PER_TOKEN], ids=["per rollout", "per token"])
@pytest.mark.parametrize("name", cuts.CUTS)
def test_a_cut_changes_no_result(folder: Path, name: str, per_token: str) -> None:
    cut = cuts.CUTS[name]
    skip_unless_possible(cut.ranks)
    if cut.ranks == 1:
        found = cuts.run_cut(folder / CUT_MODEL, f"{cut.words} {per_token}")
    else:
        found = result(folder, name)[per_token]
    expected = whole(folder, per_token)
    assert len(found["metrics"]) == cuts.NUM_STEPS
    for step, reference in zip(found["metrics"], expected["metrics"], strict=True):
        assert step == pytest.approx(reference, rel=2e-5, abs=2e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=0.0, atol=5e-6, msg=key)


def test_the_two_normalisations_differ(folder: Path) -> None:
    """Else the cases above would not notice one that is ignored."""
    per_rollout, per_token = (whole(folder, words)["metrics"][0] for words in ("", cuts.PER_TOKEN))
    assert per_rollout["pg_loss"] != pytest.approx(per_token["pg_loss"], rel=1e-2)


def test_a_step_counts_rollouts_not_their_samples(folder: Path) -> None:
    """A supervised loss by hand: mean over executions of the mean over all their tokens."""
    model = folder / CUT_MODEL
    found = cuts.run_cut(model, "--loss-type sft_loss")["metrics"]
    assert [m["global_batch_size"] for m in found] == [cuts.EXECUTIONS_PER_STEP] * cuts.NUM_STEPS
    config = trainer_config(model, "--global-batch-size", str(cuts.EXECUTIONS_PER_STEP))
    (batch,) = cuts.batches_of(config)
    assert len(batch) > cuts.EXECUTIONS_PER_STEP * cuts.NUM_STEPS, "no execution was split"
    plan = batch.steps[0]
    members = [i for micro_batch in plan.micro_batches for i in micro_batch]
    with torch.no_grad():
        log_probs = hf_log_probs(hf_model(model), batch)
    masks, loss = batch.loss_masks.rows(), 0.0
    for execution in {batch.rollout_ids[i] for i in members}:
        siblings = [i for i in members if batch.rollout_ids[i] == execution]
        num_tokens = sum(float(masks[i].sum()) for i in siblings)
        total = sum(float((log_probs[i] * masks[i]).sum()) for i in siblings)
        loss -= total / max(num_tokens, 1.0) / cuts.EXECUTIONS_PER_STEP
    assert found[0]["loss"] == pytest.approx(loss, abs=1e-5)
