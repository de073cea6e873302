"""The Triton kernels on a card against torch: the checks of the interpreter, and real sizes."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support import fused_checks as checks

pytestmark = pytest.mark.gpu1

LARGE: dict[str, Callable[[], None]] = {
    "norm": partial(checks.check_norm, (4096, 1, 2560), checks.BF16),
    "norm of 5120": partial(checks.check_norm, (512, 1, 5120), checks.FP32),
    "swiglu": partial(checks.check_swiglu, (1024, 1), 9728, checks.BF16),
    "swiglu of experts": partial(checks.check_swiglu_of_experts, 4096, 768, checks.BF16),
    "heads of Qwen3-4B": partial(checks.check_heads, 2048, 8, 4, 128, 128, dtype=checks.BF16),
    "heads of GLM-4-9B": partial(
        checks.check_heads,
        1024,
        2,
        16,
        128,
        64,
        interleaved=True,
        norm=False,
        dtype=checks.BF16,
    ),
    "gathered rows": partial(checks.check_gathered_rows, 4096, 32768, 2048, checks.BF16),
    "log-probs": partial(checks.check_log_probs, 256, 151936),
}


@pytest.fixture(autouse=True)
def on_the_card() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_kernel_equals_torch(name: str) -> None:
    checks.CHECKS[name]()


@pytest.mark.parametrize("name", LARGE)
def test_kernel_of_a_real_size_equals_torch(name: str) -> None:
    LARGE[name]()
