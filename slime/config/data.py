"""DataConfig: prompts in, and how samples become optimizer steps and micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.config.fields import flag, parse_json


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data and batching."""

    num_rollout: int | None = flag(None, "Rounds in all; or give --num-epoch.", at_least=0)
    num_epoch: int | None = flag(None, "Passes over the prompts; gives --num-rollout.", at_least=1)
    disable_rollout_global_dataset: bool = flag(
        False, "Load no prompts: the rollout function brings its own."
    )
    data_source_path: str = flag(
        "slime.rollout.data_source.RolloutDataSourceWithBuffer",
        "Class of the data source: DataSource(args).",
    )
    prompt_data: str | None = flag(None, "Prompts: .jsonl or .parquet, rows as path@[a:b].")
    apply_chat_template: bool = flag(False, "Turn messages into text by the chat template.")
    apply_chat_template_kwargs: Mapping[str, Any] = flag(
        {}, 'Arguments of the chat template as JSON, such as {"enable_thinking": false}.'
    )
    input_key: str = flag("input", "Column of the prompt.")
    label_key: str | None = flag(None, "Column of the answer.")
    multimodal_keys: Mapping[str, str] | None = flag(
        None, 'Columns of media as JSON, such as {"image": "images"}.', type=parse_json
    )
    metadata_key: str = flag("metadata", "Column of the metadata.")
    tool_key: str = flag("tools", "Column of the tools.")
    start_rollout_id: int | None = flag(
        None, "First round's number; by default it follows the loaded checkpoint.", at_least=0
    )
    rollout_batch_size: int | None = flag(None, "Prompts per round (required).", at_least=1)
    n_samples_per_prompt: int = flag(1, "Samples of each prompt: the group's size.", at_least=1)
    num_steps_per_rollout: int | None = flag(
        None, "Optimizer steps per round; gives --global-batch-size.", at_least=1
    )
    balance_data: bool = flag(False, "Spread micro-batches over ranks by estimated FLOPs.")
    balance_by_flops: bool = flag(
        False, "Form the micro-batches by estimated FLOPs too; may exceed the token cap."
    )
    use_dynamic_batch_size: bool = flag(
        False, "Pack micro-batches up to --max-tokens-per-gpu tokens."
    )
    max_tokens_per_gpu: int | None = flag(
        None, "Most tokens of a micro-batch per rank; a longer sample stands alone.", at_least=1
    )
    log_probs_max_tokens_per_gpu: int | None = flag(
        None, "The same for log-prob passes; by default --max-tokens-per-gpu."
    )
    data_pad_size_multiplier: int = flag(
        128, "A packed micro-batch is padded to a multiple of this times the TP size.", at_least=1
    )

    @property
    def rollout_global_dataset(self) -> bool:
        """Whether the data source loads --prompt-data."""
        return not self.disable_rollout_global_dataset
