"""What the model folder says: its size, and whether all of the model's flags describe it."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from slime.checkpoint.convert import check_hf_against_flags, count_parameters
from slime.checkpoint.dims import ModelDims
from slime.config.checkpoints import is_hf_folder, read_hf_config
from slime.config.config import Config
from slime.config.foreign import megatron_index, megatron_values
from slime.config.hf_check import check_against_hf
from slime.config.problems import Problems
from slime.errors import CheckpointError

# fp32 on CPU: the weights themselves, the optimizer's copy and both moments of Adam. Measured on
# the quickstart's checkpoint: 17.4 bytes per parameter, of which 1.4 are names and plans of files.
BYTES_OF_WEIGHT = 4
BYTES_OF_OPTIMIZER = 12


@dataclass(frozen=True)
class ModelFacts:
    """A model by its config.json; `num_parameters` is None for a kind that slime does not know."""

    model_type: str
    num_layers: int | None
    num_parameters: int | None
    hf_bytes_per_parameter: int

    def checkpoint_bytes(self, *, with_optimizer: bool) -> int | None:
        """Of one checkpoint, nearly."""
        if self.num_parameters is None:
            return None
        return self.num_parameters * (BYTES_OF_WEIGHT + with_optimizer * BYTES_OF_OPTIMIZER)

    def hf_bytes(self) -> int | None:
        """Of one Hugging Face folder, nearly."""
        if self.num_parameters is None:
            return None
        return self.num_parameters * self.hf_bytes_per_parameter


def check_model(config: Config, problems: Problems) -> ModelFacts | None:
    """The model in --hf-checkpoint; flags that do not describe it are noted."""
    view = problems.readable(config)
    with problems.caught():
        folder = view.hf_checkpoint
        if folder is None or not is_hf_folder(folder):
            return None  # the rules say so
        hf_config = read_hf_config(folder)
        try:
            _check_flags(folder, hf_config, view, problems)
        except CheckpointError as error:
            problems.add(f"--hf-checkpoint {folder}: {error} Take another model folder.")
            return None
        return _facts(hf_config)
    return None


def _check_flags(folder: str, hf_config: dict[str, Any], view: Config, problems: Problems) -> None:
    """The trainer's own comparison, which wants every flag; the rules compare only given ones."""
    ModelDims.from_hf_config(hf_config)
    megatron = {option.dest for option in megatron_index().options}
    if view.debug_rollout_only or problems.spoilt & megatron:
        return
    if not list(check_against_hf(folder, view)):
        check_hf_against_flags(hf_config, Namespace(**megatron_values(view.megatron_argv)))


def _facts(hf_config: dict[str, Any]) -> ModelFacts:
    kind = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return ModelFacts(
        model_type=str(hf_config.get("model_type")),
        num_layers=hf_config.get("num_hidden_layers"),
        num_parameters=count_parameters(hf_config),
        hf_bytes_per_parameter=4 if kind in (None, "float32") else 2,
    )
