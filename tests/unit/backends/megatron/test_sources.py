from dataclasses import replace
from pathlib import Path

import pytest
from support.megatron_runs import make_tiny_qwen3, trainer_config

from slime.backends.megatron.state.sources import TRACKER_FILE, find_source, resolve_start
from slime.config.config import Config
from slime.errors import CheckpointError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    model = make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=32)
    return replace(trainer_config(model), load=None, ref_load=None, finetune=False)


def megatron_folder(root: Path, latest: str, *iterations: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for name in iterations:
        (root / name).mkdir()
        (root / name / "metadata.json").write_text("{}")
    (root / TRACKER_FILE).write_text(latest)
    return str(root)


def test_megatron_checkpoint_is_resumed_after_its_iteration(config: Config, tmp_path: Path) -> None:
    folder = megatron_folder(tmp_path, "7", "iter_0000007", "iter_0000003")
    start = resolve_start(replace(config, load=folder))
    assert (start.source.path.name, start.resumes, start.first_rollout) == ("iter_0000007", True, 8)
    assert resolve_start(replace(config, load=folder), load_step=3).first_rollout == 4
    finetuned = resolve_start(replace(config, load=folder, finetune=True))
    assert (finetuned.resumes, finetuned.first_rollout) == (False, 0)


def test_release_has_weights_only(config: Config, tmp_path: Path) -> None:
    start = resolve_start(replace(config, load=megatron_folder(tmp_path, "release", "release")))
    assert (start.source.path.name, start.resumes, start.first_rollout) == ("release", False, 0)


def test_without_load_the_reference_or_else_the_hf_checkpoint_is_taken(
    config: Config, tmp_path: Path
) -> None:
    assert resolve_start(config).source.path == Path(str(config.hf_checkpoint))
    folder = megatron_folder(tmp_path, "2", "iter_0000002")
    start = resolve_start(replace(config, ref_load=folder, load=str(tmp_path / "empty")))
    assert (start.source.path.parent, start.resumes) == (tmp_path, False)


def test_a_run_never_starts_from_nothing(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no --ref-load"):
        resolve_start(replace(config, load=str(tmp_path)))
    with pytest.raises(CheckpointError, match="--ref-load"):
        resolve_start(replace(config, ref_load=str(tmp_path)))
    with pytest.raises(CheckpointError, match="missing or not whole"):
        find_source(megatron_folder(tmp_path / "broken", "5", "iter_0000004"))
    with pytest.raises(CheckpointError, match="should be a number"):
        find_source(megatron_folder(tmp_path / "strange", "five"))
    legacy = megatron_folder(tmp_path / "legacy", "5")
    (tmp_path / "legacy" / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"--ckpt-format torch.*convert_to_hf\.py"):
        find_source(legacy)
