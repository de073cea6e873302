"""Evaluation: all datasets at once through the same engines, each with its own sampling."""

import asyncio
from typing import Any
from uuid import uuid4

from slime.config.evaluation import EvalDataset
from slime.data.chat import load_tokenizer
from slime.data.dataset import Dataset, DatasetSpec
from slime.data.sample import Sample
from slime.errors import ConfigError, DeadlineExceeded
from slime.rollout.base_types import RolloutFnEvalOutput, flatten
from slime.rollout.groups import generate_and_rm_group, raise_if_all_failed
from slime.rollout.loop import gather
from slime.rollout.state import GenerateState

Status = Sample.Status


async def eval_rollout(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Answers, rewards and truncation of every sample of every dataset, in the datasets' order.

    A failed sample counts with reward 0.0.

    Raises:
        ConfigError: no dataset is named.
        DeadlineExceeded: not done within `args.rollout_timeout_s`.
        EngineError: every sample of a dataset failed.
    """
    datasets: list[EvalDataset] = list(args.eval_datasets)
    if not datasets:
        raise ConfigError("nothing to evaluate; give --eval-prompt-data or --eval-config")
    state = GenerateState(args)
    state.start_round(rollout_id)
    limit = asyncio.timeout(args.rollout_timeout_s)
    try:
        async with limit:
            entries = await gather(_eval_dataset(args, dataset) for dataset in datasets)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"evaluation {rollout_id} of {', '.join(dataset.name for dataset in datasets)} was not "
            f"done within {args.rollout_timeout_s:g} s (--rollout-timeout-s); look at the engines "
            f"{', '.join(args.engine_urls)}"
        ) from error
    data = {dataset.name: entry for dataset, entry in zip(datasets, entries, strict=True)}
    return RolloutFnEvalOutput(data=data)


async def _eval_dataset(args: Any, dataset: EvalDataset) -> dict[str, Any]:
    state = GenerateState(args)
    prompts = state.eval_prompts.get(dataset.name)
    if prompts is None:
        # Read and tokenised once per run, beside the event loop.
        prompts = await asyncio.to_thread(load_eval_prompts, args, dataset)
        state.eval_prompts[dataset.name] = prompts
    groups = eval_groups(args, dataset, prompts)
    params = eval_sampling_params(args, dataset)
    # Each evaluation of a run draws the same random numbers: less noise between them.
    stream = f"eval/{dataset.name}"
    finished = await gather(
        generate_and_rm_group(args, group, params, evaluation=True, stream=stream)
        for group in groups
    )
    raise_if_all_failed(state, finished, f"evaluation of {dataset.name}")
    samples = [sample for group in finished for sample in flatten(group)]
    return {
        "rewards": [_eval_reward(args, sample) for sample in samples],
        "truncated": [sample.status is Status.TRUNCATED for sample in samples],
        "samples": samples,
    }


def load_eval_prompts(args: Any, dataset: EvalDataset) -> Dataset:
    """The prompts of one dataset; what it leaves open is taken from the run's flags."""
    spec = DatasetSpec(
        path=dataset.path,
        input_key=dataset.input_key or args.eval_input_key or args.input_key,
        label_key=dataset.label_key or args.eval_label_key or args.label_key,
        metadata_key=dataset.metadata_key or args.metadata_key,
        tool_key=dataset.tool_key or args.eval_tool_key or args.tool_key,
        multimodal_keys=_first(dataset.multimodal_keys, args.multimodal_keys),
        apply_chat_template=bool(_first(dataset.apply_chat_template, args.apply_chat_template)),
        apply_chat_template_kwargs=_first(
            dataset.apply_chat_template_kwargs, args.apply_chat_template_kwargs
        ),
        max_prompt_len=_first(dataset.max_prompt_len, args.eval_max_prompt_len),
        metadata=dataset.metadata_overrides,
    )
    return Dataset(spec, load_tokenizer(args.hf_checkpoint))


def eval_groups(args: Any, dataset: EvalDataset, prompts: Dataset) -> list[list[Sample]]:
    """One group of fresh samples per prompt, as many as the dataset itself asks for."""
    size = dataset.n_samples_per_eval_prompt or args.n_samples_per_eval_prompt
    groups: list[list[Sample]] = []
    for position in range(len(prompts)):
        group = [prompts.sample(position) for _ in range(size)]
        for i, sample in enumerate(group):
            sample.group_index = position
            sample.index = position * size + i
            sample.session_id = uuid4().hex
            sample.custom_rm_path = dataset.custom_rm_path
            sample.generate_function_path = dataset.custom_generate_function_path
            if dataset.rm_type is not None:
                sample.metadata["rm_type"] = dataset.rm_type
        groups.append(group)
    return groups


def eval_sampling_params(args: Any, dataset: EvalDataset) -> dict[str, Any]:
    """Sampling parameters of one dataset over those of the evaluation over those of the rollout."""
    params: dict[str, Any] = dict(GenerateState(args).sampling_params)
    choices = {
        "temperature": _first(dataset.temperature, args.eval_temperature),
        "top_p": _first(dataset.top_p, args.eval_top_p),
        "top_k": _first(dataset.top_k, args.eval_top_k),
        "max_new_tokens": _first(dataset.max_response_len, args.eval_max_response_len),
        "min_new_tokens": _first(dataset.min_new_tokens, args.eval_min_new_tokens),
        "stop": None if dataset.stop is None else list(dataset.stop),
        "stop_token_ids": None if dataset.stop_token_ids is None else list(dataset.stop_token_ids),
        "skip_special_tokens": dataset.skip_special_tokens,
        "no_stop_trim": dataset.no_stop_trim,
        "repetition_penalty": dataset.repetition_penalty,
    }
    return params | {name: value for name, value in choices.items() if value is not None}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _eval_reward(args: Any, sample: Sample) -> float:
    if sample.reward is None and sample.status in (Status.FAILED, Status.ABORTED):
        return 0.0
    return sample.get_reward_value(args, evaluation=True)
