"""The functions of Apex that Megatron calls to add weight gradients to its buffers."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from slime.backends.megatron.process import gradient_accumulation as module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_added_to_what_the_buffer_holds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, grad = torch.randn(7, 5, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    before = torch.randn(3, 5, dtype=dtype)
    for add in (module.wgrad_gemm_accum_fp32, module.wgrad_gemm_accum_fp16):
        buffer = before.clone()
        add(inputs, grad, buffer)
        expected = before + torch.einsum("to,ti->oi", grad, inputs)
        torch.testing.assert_close(buffer, expected, atol=1e-5, rtol=1e-5)


def test_a_half_precision_buffer_takes_half_precision_factors() -> None:
    torch.manual_seed(0)
    inputs, grad = torch.randn(6, 4).bfloat16(), torch.randn(6, 2).bfloat16()
    buffer = torch.zeros(2, 4, dtype=torch.bfloat16)
    module.wgrad_gemm_accum_fp16(inputs, grad, buffer)
    expected = (grad.float().t() @ inputs.float()).bfloat16()
    torch.testing.assert_close(buffer, expected, atol=2e-2, rtol=2e-2)


def test_half_precision_factors_are_not_rounded_on_their_way_into_fp32() -> None:
    torch.manual_seed(0)
    inputs, grad = torch.randn(6, 4).bfloat16(), torch.randn(6, 2).bfloat16()
    buffer = torch.ones(2, 4)
    module.wgrad_gemm_accum_fp32(inputs, grad, buffer)
    torch.testing.assert_close(buffer, 1.0 + grad.float().t() @ inputs.float())


def test_no_tokens_add_nothing() -> None:
    buffer = torch.ones(2, 4)
    module.wgrad_gemm_accum_fp32(torch.empty(0, 4), torch.empty(0, 2), buffer)
    assert torch.equal(buffer, torch.ones(2, 4))


def test_megatron_finds_this_module_where_apex_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module.NAME, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module.provide()
    assert sys.modules[module.NAME] is module
    monkeypatch.delitem(sys.modules, module.NAME)


def test_apex_is_left_alone_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module.NAME, raising=False)
    spec = importlib.machinery.ModuleSpec(module.NAME, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    module.provide()
    assert module.NAME not in sys.modules
    apex = types.ModuleType(module.NAME)
    monkeypatch.setitem(sys.modules, module.NAME, apex)
    module.provide()
    assert sys.modules[module.NAME] is apex
