"""Mixture of experts: a rank's experts in two grouped products, on CPU and GPU alike.

Router, dispatcher and layer are Megatron's own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from slime.backends.megatron.layers.dense import SwiGLUMLP, parameter_device
from slime.backends.megatron.layers.kernels import swiglu
from slime.errors import ConfigError


class GroupedExperts(MegatronModule):
    """The experts of one expert-parallel rank: silu(gate) x up, then down, for each of them.

    E counts this rank's experts, f their width on this rank (cut by expert tensor parallelism).

    Attributes:
        weight1: [E, 2 f, H], gate above up.
        weight2: [E, H, f].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "MoELayer passes its groups on"
        assert config.gated_linear_unit, "SwiGLU only"
        assert config.activation_func == F.silu, "SwiGLU only"
        assert not config.add_bias_linear, "experts have no biases"
        self._groups = pg_collection
        width = config.moe_ffn_hidden_size
        assert width is not None, "set by TransformerConfig"
        width = divide(width, _size(pg_collection.expt_tp))
        hidden = config.hidden_size
        self.weight1 = _expert_weight(config, (num_local_experts, 2 * width, hidden), cut=1)
        self.weight2 = _expert_weight(config, (num_local_experts, hidden, width), cut=2)

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """([N, H] outputs times their probability, no bias) of rows sorted by expert.

        Args:
            hidden_states: [N, H].
            tokens_per_expert: [E] int64, on any device; sums to N.
            probs: [N], the router's.
        """
        if hidden_states.shape[0] == 0:
            return self._nothing(hidden_states, probs), None
        counts = tokens_per_expert.to(hidden_states.device, non_blocking=True)
        ends = counts.cumsum(0, dtype=torch.int32)
        both = F.grouped_mm(hidden_states, self.weight1.transpose(1, 2), offs=ends)
        active = _activate(both, probs)
        return F.grouped_mm(active, self.weight2.transpose(1, 2), offs=ends), None

    def _nothing(self, hidden_states: Tensor, probs: Tensor) -> Tensor:
        """[0, H] by way of the first expert, which keeps every edge of the gradient.

        The exchanges of tokens and of probs have a backward pass too: a rank that left one out
        would let the others wait for ever.
        """
        gate, up = F.linear(hidden_states, self.weight1[0]).chunk(2, -1)
        active = F.silu(gate) * up * probs[:, None].to(gate.dtype)
        return F.linear(active, self.weight2[0])

    def backward_dw(self) -> None:
        """Nothing: weight gradients come with the ordinary backward pass."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Where these experts stand among all; gate and up apart, so that any sizes can load them."""
        groups, axis = self._groups, len(sharded_offsets)
        replica: ReplicaId = (0, 0, groups.expt_dp.rank())
        experts = (axis, groups.ep.rank(), _size(groups.ep))

        def part(key: str, tensor: Tensor, dim: int, replica_id: ReplicaId) -> ShardedTensor:
            cut = (axis + dim, groups.expt_tp.rank(), _size(groups.expt_tp))
            return ShardedTensor.from_rank_offsets(
                key,
                tensor,
                *sharded_offsets,
                experts,
                cut,
                replica_id=replica_id,
                prepend_axis_num=axis,
            )

        def split(key: str, both: Tensor, replica_id: ReplicaId, _: Any) -> ShardedStateDict:
            gate, up = both.chunk(2, 1)
            return {
                "gate": part(f"{key}.gate", gate.contiguous(), 1, replica_id),
                "up": part(f"{key}.up", up.contiguous(), 1, replica_id),
            }

        first, second = f"{prefix}weight1", f"{prefix}weight2"
        return {
            first: ShardedTensorFactory(first, self.weight1, split, _join_gate_up, replica),
            second: part(second, self.weight2, 2, replica),
        }


class SharedExperts(SharedExpertMLP, SwiGLUMLP):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Megatron's MLP for every token of a mixture, with our SwiGLU."""


class Router(TopKRouter):
    """Megatron's router, whose bias stays fp32 when the model becomes bf16.

    Megatron makes it fp32 again in the first forward pass; what is loaded before is then rounded.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)
        self._maintain_float32_expert_bias()
        return self


def _expert_weight(
    config: TransformerConfig, shape: tuple[int, int, int], *, cut: int
) -> torch.nn.Parameter:
    """An expert parameter, its values not set: weights are always loaded.

    Raises:
        ConfigError: its rows are of a length that grouped products do not take.
    """
    row_bytes = shape[-1] * config.params_dtype.itemsize
    if row_bytes % 16:
        raise ConfigError(
            f"An expert's matrix has rows of {shape[-1]} numbers, {row_bytes} bytes on one rank; "
            "grouped products need multiples of 16 bytes: choose another "
            "--expert-tensor-parallel-size."
        )
    weight: Any = torch.nn.Parameter(
        torch.empty(shape, dtype=config.params_dtype, device=parameter_device())
    )
    # Gradients are reduced over the ranks that have the same experts. Marked at every size: Megatron
    # keeps one optimizer more for marked parameters, so checkpoints would else depend on the size.
    weight.allreduce = False
    weight.tensor_model_parallel = True
    weight.partition_dim, weight.partition_stride = cut, 1
    return weight


def _size(group: Any) -> int:
    return int(group.size())


def _join_gate_up(parts: ShardedStateDict) -> Tensor:
    return torch.cat([parts["gate"], parts["up"]], dim=1)


def _activate(both: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) x up x probs, in the dtype of `both` [N, 2 f], computed in that of `probs` [N]."""
    if both.is_cuda:
        from slime.backends.megatron.layers.fused import swiglu as fused

        return fused.swiglu(both, probs)
    return (swiglu(both) * probs[:, None]).to(both.dtype)
