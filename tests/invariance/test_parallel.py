"""Every parallel layout against one process of transformers with AdamW: some optimizer steps."""

import functools
from pathlib import Path

import pytest
import torch
from support import parallel_cases as cases
from support.device import possible_ranks, skip_unless_possible
from support.megatron_runs import (
    Reference,
    random_batch,
    reference_run,
)
from support.ranks import make_models, result, run_ranks

from slime.data.batch import RolloutBatch

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what the ranks left: one start for all cases of so many ranks."""
    folder = tmp_path_factory.mktemp("parallel")
    make_models(folder, [case.model for case in cases.CASES.values()])
    for world_size in possible_ranks((2, 4)):
        names = [name for name, case in cases.CASES.items() if case.ranks == world_size]
        run_ranks(folder, world_size, names)
    return folder


@functools.cache
def reference(model: Path, num_steps: int) -> Reference:
    def batch(seed: int) -> RolloutBatch:
        return random_batch(num_samples=cases.NUM_SAMPLES, vocab_size=cases.VOCAB, seed=seed)

    return reference_run(
        model, [batch(seed) for seed in cases.SEEDS[:num_steps]], probe=batch(cases.PROBE_SEED)
    )


@pytest.mark.parametrize("name", cases.CASES)
def test_steps_equal_those_of_transformers_with_adamw(folder: Path, name: str) -> None:
    case = cases.CASES[name]
    skip_unless_possible(case.ranks)
    found, expected = result(folder, name), reference(folder / case.model, case.num_steps)
    metrics = found["metrics"]
    assert [m["loss"] for m in metrics] == pytest.approx(expected.losses, abs=2e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(expected.grad_norms, rel=1e-5)
    assert found["weights"].keys() == expected.weights.keys()
    # Adam divides by the root of squares that are nearly 0 in places: rounding grows there.
    for key, weight in expected.weights.items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=0.0, atol=1e-5, msg=key)
    rows = expected.log_probs[:: found["dp_size"]]  # those of data-parallel rank 0
    for row, log_probs in zip(found["log_probs"], rows, strict=True):
        torch.testing.assert_close(row, log_probs, rtol=0.0, atol=1e-4)
