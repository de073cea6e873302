import pytest
import torch

from slime.backends.megatron.process import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed with CUDA")


def test_megatron_asks_a_proxy_and_torch_stays_as_it_is() -> None:
    from megatron.core import utils

    assert utils.torch is not torch
    assert utils.torch.cuda.current_device() == torch.device("cpu")
    assert utils.torch.zeros(2, device="cuda").device.type == "cpu"
    assert utils.torch.nn is torch.nn
    assert torch.compile.__module__ == "torch"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_second_installation_does_nothing() -> None:
    assert not cpu.install()


def test_tensor_types_are_renamed_for_megatron_only() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).cuda().device.type == "cpu"


def test_installation_after_megatron_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_installed", False)
    with pytest.raises(RuntimeError, match="was imported before"):
        cpu.install()
