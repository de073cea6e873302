"""Files written tensor by tensor, read by the library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime.checkpoint import safetensors_file
from slime.checkpoint.safetensors_file import SafetensorsFile
from slime.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.bool,
    torch.float8_e4m3fn,
    torch.uint8,
]


@pytest.mark.parametrize("room", [64 * 2**10, 8])
def test_the_library_reads_every_dtype_and_shape(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_ROOM", room)
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        **{f"t{i}": torch.arange(8 * i).reshape(2, -1).to(dtype) for i, dtype in enumerate(DTYPES)},
    }
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        file.add(name, tensor)
    file.close()
    file.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_tensor_that_would_not_be_aligned_wants_another_file(tmp_path: Path) -> None:
    file = SafetensorsFile(tmp_path / "x.safetensors")
    file.add("odd", torch.zeros(3, dtype=torch.bfloat16))
    assert file.has_room(torch.zeros(3, dtype=torch.bfloat16), 100)
    assert not file.has_room(torch.zeros(1), 100)
    assert not file.has_room(torch.zeros(48, dtype=torch.bfloat16), 100)
    file.close()


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    file = SafetensorsFile(tmp_path / "x.safetensors")
    file.add("a", torch.arange(100))
    file.close()
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="reads back as something else"):
        file.verify()
