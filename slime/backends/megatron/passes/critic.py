"""A critic: the actor's transformer with an output layer of one number per token."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.backends.megatron.layers.dense import parameter_device
from slime.backends.megatron.packs.pack import MicroBatch
from slime.backends.megatron.passes.forward import ResponseOutputs, forward_pack, predicting_rows
from slime.backends.megatron.process.parallel import tp_group
from slime.errors import ConfigError

# Its place in checkpoints: where an actor has its output layer.
HEAD_NAME = "output_layer.weight"


class ValueHead(torch.nn.Module):
    """A linear map to one number, whole on each tensor-parallel rank, summed in fp32.

    Its weight starts at zero, and stays so when a Hugging Face folder is loaded, which has none: the
    first values are 0 and favour no action, and the first step trains the head alone. A critic's own
    checkpoint restores it.

    Attributes:
        weight: [1, H] in the model's dtype.
        sequence_parallel: hidden states come cut over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        shape = (1, config.hidden_size)
        self.weight = torch.nn.Parameter(
            torch.zeros(shape, dtype=config.params_dtype, device=parameter_device())
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[N] fp32 from [N, H]."""
        return (hidden.float() @ self.weight.float().t()).squeeze(1)


def add_value_head(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Put a value head in the place of the output layer; a stage without one stays as it is.

    Raises:
        ConfigError: the model has no output layer where one belongs, so it can be no critic.
    """
    model: Any = chunk
    if not model.post_process:
        return
    if getattr(model, "output_layer", None) is None:
        raise ConfigError(
            "The critic's model has no output_layer; the function of --custom-model-provider-path "
            "has to build a model with one, as GPTModel."
        )
    model.output_layer = ValueHead(config)


def forward_values(model: torch.nn.Module, micro: MicroBatch) -> ResponseOutputs | Tensor:
    """A critic's values of the response tokens, each where the token is predicted."""

    def read(hidden: Tensor, layer: Any, shared: Tensor | None) -> ResponseOutputs:
        if layer.sequence_parallel:
            # Every rank computes the same values and gradients: nothing is to be summed.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=tp_group()
            )
        values = layer(predicting_rows(hidden, micro))
        return ResponseOutputs(torch.full_like(values, torch.nan), values=values)

    return forward_pack(model, micro, read)
