"""The format torch_dist: parts of any cut, and what is wrong with a file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slime.checkpoint.torch_dist import (
    SectionWriter,
    TorchDistFolder,
    finish_checkpoint,
    is_written,
    verify_section,
)
from slime.errors import CheckpointError

WHOLE = torch.arange(6 * 10, dtype=torch.float32).reshape(6, 10)


def write_grid(folder: Path, rows: list[int], columns: list[int], whole: Tensor = WHOLE) -> None:
    """`whole` in a section for each strip of rows, each strip in parts."""
    names: list[str] = []
    for number, start in enumerate(rows):
        stop = [*rows, len(whole)][number + 1]
        names.append(f"strip-{number}")
        with SectionWriter(folder, names[-1]) as writer:
            for at, first in enumerate(columns):
                last = [*columns, whole.shape[1]][at + 1]
                part = whole[start:stop, first:last]
                writer.add(
                    "a",
                    part,
                    shape=tuple(whole.shape),
                    offsets=(start, first),
                    sizes=tuple(part.shape),
                )
    finish_checkpoint(folder, names, {"iteration": 3})


@pytest.mark.parametrize("rows", [[0], [0, 1, 5], [0, 2, 4]])
@pytest.mark.parametrize("columns", [[0], [0, 5], [0, 1, 9]])
def test_any_part_is_read_from_parts_of_any_cut(
    tmp_path: Path, rows: list[int], columns: list[int]
) -> None:
    write_grid(tmp_path, rows, columns)
    folder = TorchDistFolder(tmp_path)
    assert folder.shapes() == {"a": (6, 10)}
    for top in range(6):
        for height in range(1, 7 - top):
            for left, width in ((0, 10), (3, 4), (9, 1)):
                found = folder.tensor("a", (top, left), (height, width))
                assert torch.equal(found, WHOLE[top : top + height, left : left + width])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load

    write_grid(tmp_path, [0, 4], [0, 5], WHOLE.bfloat16())
    found = {"a": torch.zeros(6, 10, dtype=torch.bfloat16)}
    load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(found["a"], WHOLE.bfloat16())


def test_views_take_their_own_bytes_alone(tmp_path: Path) -> None:
    big = torch.zeros(1000, 1000)
    with SectionWriter(tmp_path, "one") as writer:
        writer.add("a", big[:2, :3], shape=(2, 3), offsets=(0, 0), sizes=(2, 3))
    assert (tmp_path / "one.distcp").stat().st_size < 10_000


def test_an_interrupted_section_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SectionWriter(tmp_path, "one") as writer:
            writer.add("a", WHOLE, shape=(6, 10), offsets=(0, 0), sizes=(6, 10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_written(tmp_path, "one")
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_not_whole(tmp_path: Path) -> None:
    with SectionWriter(tmp_path, "one") as writer:
        writer.add("a", WHOLE, shape=(6, 10), offsets=(0, 0), sizes=(6, 10))
    assert is_written(tmp_path, "one")
    file = tmp_path / "one.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_written(tmp_path, "one")
    with pytest.raises(CheckpointError, match="missing or not whole"):
        finish_checkpoint(tmp_path, ["one"], {})


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    with SectionWriter(tmp_path, "one") as writer:
        writer.add("a", WHOLE, shape=(6, 10), offsets=(0, 0), sizes=(6, 10))
    size = (tmp_path / "one.distcp").stat().st_size
    assert verify_section(tmp_path, "one") == size
    content = bytearray((tmp_path / "one.distcp").read_bytes())
    content[size // 2] ^= 1
    (tmp_path / "one.distcp").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a at \[0, 0\] reads back as something else"):
        verify_section(tmp_path, "one")


def test_a_gap_between_parts_is_named(tmp_path: Path) -> None:
    with SectionWriter(tmp_path, "one") as writer:
        writer.add("a", WHOLE[:4], shape=(6, 10), offsets=(0, 0), sizes=(4, 10))
    with pytest.raises(CheckpointError, match="a has 60 numbers, its parts have 40"):
        finish_checkpoint(tmp_path, ["one"], {})


def test_parts_that_disagree_are_named(tmp_path: Path) -> None:
    with SectionWriter(tmp_path, "one") as writer:
        writer.add("a", WHOLE[:3], shape=(6, 10), offsets=(0, 0), sizes=(3, 10))
        writer.add("a", WHOLE[3:].bfloat16(), shape=(6, 10), offsets=(3, 0), sizes=(3, 10))
    with pytest.raises(CheckpointError, match=r"a is \[6, 10\] in torch.float32 .* torch.bfloat16"):
        finish_checkpoint(tmp_path, ["one"], {})


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        TorchDistFolder(tmp_path)
    write_grid(tmp_path, [0], [0])
    folder = TorchDistFolder(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor b"):
        folder.tensor("b", (0,), (1,))
    (tmp_path / "strip-0.distcp").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"strip-0\.distcp: a cannot be read"):
        folder.tensor("a", (0, 0), (6, 10))
    (tmp_path / ".metadata").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        TorchDistFolder(tmp_path)
