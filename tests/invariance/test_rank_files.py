"""What stock Megatron saves, with --ckpt-format torch in every layout, is the Hugging Face folder again.

And what is no such checkpoint, or not all of one, is refused by name.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rank_file_cases as cases
from support.ranks import make_models, result, run_ranks

from slime.checkpoint import rank_files
from slime.checkpoint.folders import megatron_to_hf
from slime.checkpoint.hf import HfFolder
from slime.checkpoint.rank_files import FILE_NAME, RankFiles, RankLayout
from slime.config.checkpoints import TRACKER_FILE
from slime.errors import CheckpointError

DENSE = "qwen3 tied, tp2 pp2 vpp2, local"
EXPERTS = "qwen3_moe, tp2 etp1 ep4, local"
ITERATION = f"iter_{cases.ITERATION:07d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and their checkpoints."""
    folder = tmp_path_factory.mktemp("rank_files")
    make_models(folder, {case.model for case in cases.CASES.values()})
    run_ranks(folder, 1, [*cases.CASES, *cases.TORCH_DIST_CASES], cases.__name__)
    return folder


def origin_of(folder: Path, name: str) -> Path:
    return folder / cases.CASES[name].model


def saved(folder: Path, name: str, tmp_path: Path) -> Path:
    """A copy of a case's checkpoint, to change."""
    assert result(folder, name)["files"]
    return Path(shutil.copytree(cases.checkpoint_of(folder, name), tmp_path / "saved"))


def assert_equal_folders(found: Path, expected: Path) -> None:
    with HfFolder(found) as ours, HfFolder(expected) as theirs:
        assert set(ours.names()) == set(theirs.names())
        for name in theirs.names():
            assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


@pytest.mark.parametrize("name", cases.CASES)
def test_what_megatron_saves_is_the_folder_again(folder: Path, tmp_path: Path, name: str) -> None:
    files = set(result(folder, name)["files"])
    checkpoint = cases.checkpoint_of(folder, name)
    assert {file.parent.name for file in RankFiles(checkpoint / ITERATION).files()} <= files
    origin = origin_of(folder, name)
    megatron_to_hf(checkpoint, tmp_path / "back", origin=origin, ckpt_format="torch")
    assert_equal_folders(tmp_path / "back", origin)


@pytest.mark.parametrize("name", cases.TORCH_DIST_CASES)
def test_so_is_what_its_own_layers_are_as_torch_dist(
    folder: Path, tmp_path: Path, name: str
) -> None:
    found = result(folder, name)
    assert "metadata.json" in found["files"]
    shared = {key for key in found["keys"] if key.startswith("decoder.layers.mlp.")}
    assert bool(shared) == ("equal layers" in name or name.startswith("qwen3 as"))
    origin = folder / cases.TORCH_DIST_CASES[name].model
    megatron_to_hf(cases.checkpoint_of(folder, name), tmp_path / "back", origin=origin)
    assert_equal_folders(tmp_path / "back", origin)


def test_a_release_is_taken_and_files_are_read_again_after_they_were_let_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(folder, EXPERTS, tmp_path)
    (checkpoint / ITERATION).rename(checkpoint / "release")
    (checkpoint / TRACKER_FILE).write_text("release")
    monkeypatch.setattr(rank_files, "_MAX_MAPPED_BYTES", 10_000)
    monkeypatch.setattr(rank_files, "_MAX_OPEN_FILES", 2)
    megatron_to_hf(checkpoint, tmp_path / "back", origin=origin_of(folder, EXPERTS))
    assert_equal_folders(tmp_path / "back", origin_of(folder, EXPERTS))


def test_files_are_those_that_megatrons_ranks_write() -> None:
    sizes = itertools.product([1, 2, 4], [1, 2], [1, 2, 3, 4, 8], [1, 2, 4])
    for tp, cp, ep, etp in sizes:
        if tp % etp == 0:
            _check_written_files(tp, cp, ep, etp)


def _check_written_files(tp: int, cp: int, ep: int, etp: int) -> None:
    """Against all ranks of two groups of experts' data-parallel ranks, one by one."""
    layout = RankLayout(tp_size=tp, pp_size=1, vpp_size=1, ep_size=ep, etp_size=etp)
    world = 2 * tp * cp * ep * etp
    written, shards = set[tuple[int, int]](), set[tuple[int, int]]()
    for rank in range(world):
        file = (rank % tp, rank // etp % ep)
        shards.add((rank // etp % ep, rank % etp))
        dp_rank, expert_dp_rank = rank // (tp * cp), rank // (etp * ep)
        if dp_rank == 0 or expert_dp_rank == 0:
            written.add(file)
    needed = layout.stage_ranks()
    assert needed <= written <= layout.possible_ranks()
    assert {tp_rank for tp_rank, _ in needed} == set(range(tp))
    assert {(ep_rank, tp_rank % etp) for tp_rank, ep_rank in needed} == shards


def test_an_interrupted_conversion_goes_on_with_the_next_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, checkpoint = origin_of(folder, DENSE), cases.checkpoint_of(folder, DENSE)
    joined: list[int] = []
    real = RankFiles.count

    def failing(self: RankFiles, num_bytes: int) -> None:
        joined.append(num_bytes)
        if len(joined) == 20:
            raise KeyboardInterrupt
        real(self, num_bytes)

    def convert() -> None:
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin, max_shard_bytes=100_000)

    monkeypatch.setattr(RankFiles, "count", failing)
    with pytest.raises(KeyboardInterrupt):
        convert()
    assert not (tmp_path / "back").exists()
    before = len(joined)
    convert()
    everything = 2 + 4 * 8  # tensors of a tied model of four layers
    assert len(joined) - before < everything
    assert_equal_folders(tmp_path / "back", origin)
    with pytest.raises(CheckpointError, match="not empty"):
        convert()


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a file holds; settings and random states that are not read are left out."""
    content = rank_files._load(file)
    kept = {key: content[key] for key in content if key in ("checkpoint_version", "iteration")}
    kept["args"] = argparse.Namespace(
        **{
            name: value
            for name, value in vars(content["args"]).items()
            if isinstance(value, bool | int | float | str | None)
        }
    )
    kept |= {key: dict(content[key]) for key in content if key.startswith("model")}
    change(kept)
    torch.save(kept, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


class Foreign:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Harmless:
    """A class of nobody's list."""


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: vars(content["args"]).update(values)


def _add(chunk: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[chunk].update({name: torch.zeros(2)})


_LAYER = "decoder.layers.0"
_WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "left over": (
        _add("model1", f"{_LAYER}.mlp.extra.weight"),
        rf"mp_rank_01_001.*virtual stage 1.*1 left over: {_LAYER}\.mlp\.extra\.weight",
    ),
    "missing": (
        lambda content: content["model0"].pop(f"{_LAYER}.pre_mlp_layernorm.weight"),
        rf"mp_rank_01_001.*virtual stage 0.*1 missing: {_LAYER}\.pre_mlp_layernorm\.weight",
    ),
    "another shape": (
        _add("model0", f"{_LAYER}.mlp.linear_fc2.weight"),
        rf"parts of {_LAYER.replace('0', '1')}\.mlp\.linear_fc2\.weight differ: .*\[2\]",
    ),
    "another iteration": (
        lambda content: content.update(iteration=8),
        "of another layout or iteration than",
    ),
    "another layout": (_set(virtual_pipeline_model_parallel_size=None), "of two runs"),
    "no virtual stages": (
        lambda content: content.update(model=content.pop("model0")),
        "holds model, model1, but its args say 2 virtual pipeline stages",
    ),
    "norms less one": (
        _set(layernorm_zero_centered_gamma=True),
        "layernorm_zero_centered_gamma=True; only False",
    ),
    "old version": (lambda content: content.update(checkpoint_version=1.0), "version 1.0"),
    "no args": (lambda content: content.pop("args"), "holds no args"),
    "legacy model": (
        lambda content: content["model0"].update(language_model={}),
        "language_model is no tensor but a dict",
    ),
    "a class": (
        lambda content: content.update(hook=Harmless()),
        r"names .*test_rank_files\.Harmless, which reading it would import and could run",
    ),
}


@pytest.mark.parametrize("what", _WRONG)
def test_what_is_wrong_with_one_file_is_named(folder: Path, tmp_path: Path, what: str) -> None:
    checkpoint = saved(folder, DENSE, tmp_path)
    change, message = _WRONG[what]
    _edit(checkpoint / ITERATION / "mp_rank_01_001" / FILE_NAME, change)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin_of(folder, DENSE))
    assert not (tmp_path / "back").exists()


def test_a_file_that_would_run_a_command_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    checkpoint = saved(folder, DENSE, tmp_path)
    ran = tmp_path / "ran"
    for name in ("mp_rank_00_000", "mp_rank_01_001"):
        file = checkpoint / ITERATION / name / FILE_NAME
        _edit(file, lambda content: content.update(hook=Foreign(ran)))
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin_of(folder, DENSE))
    assert not ran.exists()


def test_missing_and_left_over_files_are_named(folder: Path, tmp_path: Path) -> None:
    checkpoint, origin = saved(folder, EXPERTS, tmp_path), origin_of(folder, EXPERTS)
    (checkpoint / ITERATION / "mp_rank_01_003").rename(checkpoint / ITERATION / "mp_rank_01_002")
    with pytest.raises(
        CheckpointError, match=r"1 missing: mp_rank_01_003; 1 left over: mp_rank_01_002"
    ):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin)
    (checkpoint / ITERATION / "mp_rank_01_002").rename(checkpoint / ITERATION / "mp_rank_01_003")
    file = checkpoint / ITERATION / "mp_rank_01_003" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_003.*cannot be read"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin)
    file.unlink()
    with pytest.raises(CheckpointError, match="1 missing: mp_rank_01_003"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin)


def test_another_format_or_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint, origin = saved(folder, EXPERTS, tmp_path), origin_of(folder, EXPERTS)
    with pytest.raises(CheckpointError, match="--ckpt-format torch, not torch_dist"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin, ckpt_format="torch_dist")
    (checkpoint / TRACKER_FILE).write_text("9")
    with pytest.raises(CheckpointError, match=f"says '9'.*it holds {ITERATION}: name one of them"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin)
    (checkpoint / TRACKER_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no Megatron checkpoint.*it holds {ITERATION}"):
        megatron_to_hf(checkpoint, tmp_path / "back", origin=origin)
    megatron_to_hf(checkpoint / ITERATION, tmp_path / "back", origin=origin)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The shapes of both are the same.
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
            "num_attention_heads 4 instead of 2, num_query_groups 2 instead of 1",
        ),
        ({"num_hidden_layers": 3}, "4 layers together, the config of --origin-hf-dir 3"),
        (
            {"intermediate_size": 96},
            r"linear_fc1\.weight, joined from 2 ranks, has shape \[256, 64\]",
        ),
        ({"model_type": "qwen3"}, "missing: .*q_layernorm.*; 4 left over: .*linear_qkv.bias"),
        ({"vocab_size": 500}, "cannot hold the checkpoint's 500 tokens"),
    ],
)
def test_another_model_is_named_by_what_differs(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    name = "qwen2, tp2, te"
    origin = Path(shutil.copytree(origin_of(folder, name), tmp_path / "origin"))
    config = json.loads((origin / "config.json").read_text()) | changes
    (origin / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(cases.checkpoint_of(folder, name), tmp_path / "back", origin=origin)
    assert not (tmp_path / "back").exists()
