"""Hugging Face to torch_dist and back through every family and layout: the same bits."""

from pathlib import Path

import pytest
import torch
from support import parallel_cases as cases
from support.device import skip_unless_possible
from support.ranks import make_models, result, run_ranks

from slime.checkpoint.folders import hf_to_torch_dist, megatron_to_hf
from slime.checkpoint.hf import HfFolder

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, their checkpoints, and what two ranks made of them."""
    skip_unless_possible(2)
    folder = tmp_path_factory.mktemp("conversion")
    models = sorted({case.model for case in cases.CONVERSIONS.values()})
    make_models(folder, models)
    for model in models:
        # Another padding than the trainers', which pad to a multiple of 8 x TP.
        hf_to_torch_dist(folder / model, cases.released(folder, model), padded_vocab_size=128)
    run_ranks(folder, 2, list(cases.CONVERSIONS))
    return folder


def assert_equal_folders(found: Path, expected: Path) -> None:
    with HfFolder(found) as ours, HfFolder(expected) as theirs:
        assert set(ours.names()) == set(theirs.names())
        for name in theirs.names():
            assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


@pytest.mark.parametrize("name", cases.CONVERSIONS)
def test_a_converted_folder_passes_through_two_ranks_bit_for_bit(
    folder: Path, tmp_path: Path, name: str
) -> None:
    assert result(folder, name)["first_rollout"] == 0
    origin = folder / cases.CONVERSIONS[name].model
    megatron_to_hf(cases.checkpoint_of(folder, name), tmp_path / "back", origin=origin)
    assert_equal_folders(tmp_path / "back", origin)
