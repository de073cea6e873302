"""Weight gradients added to Megatron's gradient buffer by the matrix product itself.

Megatron's linear layers can do so through a module of Apex, which they import by name and call with
two functions. cuBLAS and torch's `addmm` do the same: this module has those functions, and
`provide` puts it where Megatron looks, unless Apex is installed. A gradient is then neither rounded
to bf16 nor written and read once more.
"""

import importlib.util
import sys

from torch import Tensor

from slime.training.linear_log_probs import add_product

NAME = "fused_weight_gradient_mlp_cuda"


def provide() -> None:
    """Let the coming import of Megatron find this module."""
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = sys.modules[__name__]


def wgrad_gemm_accum_fp32(inputs: Tensor, grad: Tensor, buffer: Tensor) -> None:
    """buffer += grad^T @ inputs, in fp32.

    Args:
        inputs: [T, in].
        grad: [T, out], of the dtype of `inputs`.
        buffer: [out, in] fp32.
    """
    add_product(buffer, grad.t(), inputs)


def wgrad_gemm_accum_fp16(inputs: Tensor, grad: Tensor, buffer: Tensor) -> None:
    """The same into a buffer of half precision, of the dtype of `inputs`."""
    add_product(buffer, grad.t(), inputs)
