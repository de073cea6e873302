"""The forward pass of one micro-batch: log-probs and entropy of its response tokens alone.

The output layer is the largest matrix of a small model, and only hidden states that predict a
response token need it: they are picked out first, through GPTModel's own `output_processor` hook.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.backends.megatron.pack import MicroBatch
from slime.training.interface import TokenView
from slime.training.log_probs import log_probs_and_entropy


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
    """[N] log-probs with gradient, and [N] entropy or None, of a micro-batch's response tokens."""

    log_probs: Tensor
    entropy: Tensor | None


def forward_responses(
    model: torch.nn.Module, micro: MicroBatch, options: LogProbOptions, *, needs_entropy: bool
) -> ResponseOutputs:
    """Run the model on a pack."""

    def process(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
    ) -> ResponseOutputs:
        # `LastLayer` has picked them already, unless the model has another spec.
        if hidden_states.shape[0] == micro.tokens.shape[1]:
            hidden_states = hidden_states.index_select(0, micro.predict)
        logits, _ = output_layer(hidden_states, weight=output_weight)
        log_probs, entropy = log_probs_and_entropy(
            logits.squeeze(1),
            micro.targets,
            temperature=options.temperature,
            needs_entropy=needs_entropy,
            chunk_size=options.chunk_size,
            vocab_size=options.vocab_size,
            overwrite_logits=True,
        )
        return ResponseOutputs(log_probs, entropy)

    return model(
        input_ids=micro.tokens,
        position_ids=None,
        attention_mask=None,
        packed_seq_params=micro.packed,
        output_processor=process,
    )


def token_view(
    outputs: ResponseOutputs, micro: MicroBatch, columns: Mapping[str, list[Tensor]]
) -> TokenView:
    """What a loss sees of this micro-batch; `columns` hold [R] per sample of the rank's batch."""
    device = outputs.log_probs.device
    num_segments = len(micro.samples)

    def segment_sum(values: Tensor) -> Tensor:
        return values.new_zeros(num_segments).index_add(0, micro.segments, values)

    return TokenView(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        columns={
            name: torch.cat([rows[i] for i in micro.samples]).to(device, torch.float32)
            for name, rows in columns.items()
        },
        segments=micro.segments,
        num_segments=num_segments,
        segment_sum=segment_sum,
    )
