"""The forward pass of one micro-batch: log-probs and entropy of its response tokens alone.

The output layer is the largest matrix of a small model and its logits the largest tensor of any.
Only hidden states that predict a response token need it: they are picked out first, through
GPTModel's own `output_processor` hook, and no logits outlive a chunk of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from slime.backends.megatron.packs.pack import MicroBatch
from slime.backends.megatron.process.parallel import ready_weight, tp_group
from slime.training.linear_log_probs import OutputWeight, linear_log_probs_and_entropy
from slime.training.log_probs import true_columns


@dataclass(frozen=True, kw_only=True)
class LogProbOptions:
    """How log-probs are computed from hidden states.

    Attributes:
        temperature: logits are divided by it.
        chunk_size: rows per chunk in fp32; -1 = chosen by size.
        vocab_size: columns that exist in the vocabulary; the rest is padding.
    """

    temperature: float
    chunk_size: int
    vocab_size: int


@dataclass(frozen=True)
class ResponseOutputs:
    """[N] of a micro-batch's response tokens, all fp32 and with gradient.

    Attributes:
        log_probs: NaN where there are values or logits instead.
        entropy: or None.
        values: of a critic.
        logits: [1, T, V / tp] of the whole pack, in the model's dtype.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    logits: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Megatron's schedules ask for it when a model has experts."""
        return self.log_probs.device


# last hidden states [rows, 1, H], output layer, the embedding's weight if shared -> outputs
Readout = Callable[[Tensor, Any, Tensor | None], ResponseOutputs]
# A chunk of the model on a micro-batch. A stage before the last gives its hidden states.
Forward = Callable[[torch.nn.Module, MicroBatch], ResponseOutputs | Tensor]


def forward_responses(
    model: torch.nn.Module, micro: MicroBatch, options: LogProbOptions, *, needs_entropy: bool
) -> ResponseOutputs | Tensor:
    """Log-probs, and entropy if asked for, of the response tokens."""

    def read(hidden: Tensor, layer: Any, shared: Tensor | None) -> ResponseOutputs:
        return _response_outputs(
            hidden,
            _output(layer, shared),
            micro,
            options,
            needs_entropy=needs_entropy,
            is_scattered=layer.sequence_parallel,
        )

    return forward_pack(model, micro, read)


def forward_pack(
    model: torch.nn.Module, micro: MicroBatch, read: Readout
) -> ResponseOutputs | Tensor:
    """Run the model on a pack; a pipeline stage before the last returns its hidden states."""

    def process(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
    ) -> ResponseOutputs:
        return read(hidden_states, output_layer, output_weight)

    return model(
        input_ids=micro.tokens,
        position_ids=None,
        attention_mask=None,
        packed_seq_params=micro.packed,
        output_processor=process,
    )


def _output(layer: Any, shared: Tensor | None) -> OutputWeight:
    """The output weight, with Megatron's gradient buffer where there is one."""
    weight: Any = ready_weight(layer) if shared is None else shared
    buffer = weight.main_grad if weight.requires_grad and hasattr(weight, "main_grad") else None
    # Megatron marks a weight that is the embedding of this stage too: its hook adds the embedding's
    # gradient to the buffer whatever ours was.
    is_embedding = getattr(weight, "zero_out_wgrad", False)
    return OutputWeight(weight, buffer, marks_buffer=not is_embedding)


def _response_outputs(
    hidden: Tensor,
    output: OutputWeight,
    micro: MicroBatch,
    options: LogProbOptions,
    *,
    needs_entropy: bool,
    is_scattered: bool,
) -> ResponseOutputs:
    group = tp_group()
    if is_scattered:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    elif group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    log_probs, entropy = linear_log_probs_and_entropy(
        predicting_rows(hidden, micro),
        output,
        micro.targets,
        temperature=options.temperature,
        needs_entropy=needs_entropy,
        chunk_size=options.chunk_size,
        vocab_size=options.vocab_size,
        vocab_start=group.rank() * output.weight.shape[0],
        vocab_group=group if group.size() > 1 else None,
    )
    return ResponseOutputs(log_probs, entropy)


def predicting_rows(hidden: Tensor, micro: MicroBatch) -> Tensor:
    """[N, H] hidden states that predict a response token, from [rows, 1, H] of all ranks of TP."""
    # `LastLayer` has picked them already, unless the model has another spec.
    if hidden.shape[0] == micro.tokens.shape[1]:
        hidden = hidden.index_select(0, micro.predict)
    return hidden.squeeze(1)


def forward_logits(
    model: torch.nn.Module, micro: MicroBatch, options: LogProbOptions
) -> ResponseOutputs | Tensor:
    """Logits of every token of the pack, of the columns that exist in this rank's vocabulary."""

    def read(hidden: Tensor, layer: Any, shared: Tensor | None) -> ResponseOutputs:
        logits, _ = layer(hidden, weight=shared, runtime_gather_output=False)
        start = tp_group().rank() * logits.shape[-1]
        columns = true_columns(logits.shape[-1], options.vocab_size, start)
        nothing = torch.full((len(micro.predict),), torch.nan, device=logits.device)
        return ResponseOutputs(nothing, logits=logits.transpose(0, 1)[..., :columns])

    return forward_pack(model, micro, read)
