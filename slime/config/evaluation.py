"""EvalConfig and EvalDataset: what is evaluated, how often and with which sampling."""

from dataclasses import dataclass, field
from typing import Any

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """One evaluation dataset with its settings; None of a setting means that of the run.

    `resolve` fills every None that has a default, so readers see final values.
    """

    name: str
    path: str
    rm_type: str | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    max_prompt_len: int | None = None
    max_context_len: int | None = None
    min_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    repetition_penalty: float | None = None
    apply_chat_template: bool | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = None
    multimodal_keys: dict[str, str] | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation."""

    eval_function_path: str | None = flag(
        None, "Function that evaluates; by default --rollout-function-path."
    )
    eval_prompt_data: tuple[str, ...] | None = flag(
        None, "Datasets as pairs: name path name path; one path alone is named aime."
    )
    eval_config: str | None = flag(
        None, "YAML eval: {defaults, datasets}; used instead of --eval-prompt-data."
    )
    skip_eval_before_train: bool = flag(False, "No evaluation before the first update.")
    eval_input_key: str | None = flag(None, "Column of the prompt; by default --input-key.")
    eval_label_key: str | None = flag(None, "Column of the answer; by default --label-key.")
    eval_tool_key: str | None = flag(None, "Column of the tools; by default --tool-key.")
    n_samples_per_eval_prompt: int = flag(1, "Samples of each evaluation prompt.", at_least=1)
    eval_temperature: float | None = flag(
        None, "Sampling temperature; by default --rollout-temperature; 0 is greedy.", at_least=0
    )
    eval_top_p: float | None = flag(None, "Nucleus sampling; by default --rollout-top-p.")
    eval_top_k: int | None = flag(None, "Likeliest tokens; by default --rollout-top-k.")
    eval_max_response_len: int | None = flag(
        None, "Most tokens of a response; by default --rollout-max-response-len.", at_least=1
    )
    eval_max_prompt_len: int | None = flag(None, "Longer prompts are dropped at load.", at_least=1)
    eval_max_context_len: int | None = flag(
        None,
        "Most tokens of prompt and response; by default --rollout-max-context-len.",
        at_least=1,
    )
    eval_min_new_tokens: int | None = flag(None, "Fewest tokens of a response.", at_least=0)
    eval_datasets: tuple[EvalDataset, ...] = ()
