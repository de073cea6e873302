"""Rules about parallel sizes: what Megatron would say late and in its own words."""

import logging
from collections.abc import Iterator
from typing import Any

from slime.config.config import Config
from slime.config.foreign import megatron_values
from slime.config.layout import expert_tensor_size, is_interleaved

logger = logging.getLogger(__name__)


def parallel_sizes(config: Config) -> Iterator[str]:
    """What is wrong with the parallel sizes of the trainer, its layers and experts."""
    if config.debug_rollout_only:
        return
    megatron = megatron_values(config.megatron_argv)
    yield from _tensor(config, megatron)
    yield from _pipeline(config)
    yield from _experts(config, megatron)
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        logger.warning("--sequence-parallel has no effect with --tensor-model-parallel-size 1")


def _tensor(config: Config, megatron: dict[str, Any]) -> Iterator[str]:
    size = config.tensor_model_parallel_size
    if size == 1:
        return
    counts = {"--num-attention-heads": megatron["num_attention_heads"]}
    if megatron["group_query_attention"]:
        counts["--num-query-groups"] = megatron["num_query_groups"]
    for flag, count in counts.items():
        # Ranks may share a group of keys: Megatron then gives each of them a copy.
        if count and count % size and (flag == "--num-attention-heads" or size % count):
            yield (
                f"--tensor-model-parallel-size {size} does not divide {flag} {count}: each rank "
                "has whole heads; choose another size"
            )
    needs_sequences = {
        "experts (--num-experts)": megatron["num_experts"],
        "--multi-latent-attention": megatron["multi_latent_attention"],
    }
    for what, is_given in needs_sequences.items():
        if is_given and not config.sequence_parallel:
            yield f"{what} with --tensor-model-parallel-size {size} needs --sequence-parallel; add it"


def _pipeline(config: Config) -> Iterator[str]:
    size, num_layers = config.pipeline_model_parallel_size, config.num_layers
    megatron = megatron_values(config.megatron_argv)
    first = megatron["decoder_first_pipeline_num_layers"]
    last = megatron["decoder_last_pipeline_num_layers"]
    ends = {
        "--decoder-first-pipeline-num-layers": first,
        "--decoder-last-pipeline-num-layers": last,
        "--num-layers-per-virtual-pipeline-stage": config.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": config.num_virtual_stages_per_pipeline_rank,
    }
    if size == 1:
        for flag, value in ends.items():
            if value is not None:
                yield (
                    f"{flag} {value} needs --pipeline-model-parallel-size above 1; raise that, or "
                    "leave it out"
                )
        return
    if is_interleaved(config) and all(value is not None for value in list(ends.values())[2:]):
        yield (
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "say the same thing; give one of them"
        )
    if num_layers is None:
        return
    middle = num_layers - (first or 0) - (last or 0)
    stages = size - (first is not None) - (last is not None)
    if middle < stages or (stages and middle % stages) or (not stages and middle):
        yield (
            f"--pipeline-model-parallel-size {size} does not divide --num-layers {num_layers}"
            f"{_ends(first, last)} into {stages} equal stages; give "
            "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers so that "
            "the others do, or another size"
        )
        return
    per_stage = {count for count in (first, last) if count is not None}
    per_stage |= {middle // stages} if stages else set()
    yield from _interleaved(config, per_stage)


def _interleaved(config: Config, per_stage: set[int]) -> Iterator[str]:
    parts = {
        "--num-layers-per-virtual-pipeline-stage": config.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": config.num_virtual_stages_per_pipeline_rank,
    }
    for flag, size in parts.items():
        for count in sorted(count for count in per_stage if size and count % size):
            yield (
                f"{flag} {size} does not divide the {count} layers of a pipeline rank; choose "
                "another number"
            )


def _ends(first: int | None, last: int | None) -> str:
    """` less 1 of the first stage`: what the layers between the ends leave out."""
    parts = [
        f"{count} of the {name} stage"
        for name, count in (("first", first), ("last", last))
        if count is not None
    ]
    return f" less {' and '.join(parts)}" if parts else ""


def _experts(config: Config, megatron: dict[str, Any]) -> Iterator[str]:
    num_experts, ranks = megatron["num_experts"], config.expert_model_parallel_size
    if not num_experts:
        if ranks > 1:
            yield (
                f"--expert-model-parallel-size {ranks}: the model has no experts (--num-experts); "
                "leave it out"
            )
        return
    if num_experts % ranks:
        yield f"--expert-model-parallel-size {ranks} does not divide --num-experts {num_experts}"
    tensor, own = config.tensor_model_parallel_size, expert_tensor_size(config)
    if own > tensor:
        yield (
            f"--expert-tensor-parallel-size {own} is greater than --tensor-model-parallel-size "
            f"{tensor}, which is not built; lower it, or raise --expert-model-parallel-size instead"
        )
    world_size = config.actor_num_nodes * config.actor_num_gpus_per_node
    together = own * ranks * config.pipeline_model_parallel_size
    if world_size % together:
        yield (
            f"expert tensor x expert x pipeline parallel size = {own} x {ranks} x "
            f"{config.pipeline_model_parallel_size} = {together} does not divide "
            f"--actor-num-nodes x --actor-num-gpus-per-node = {world_size}; "
            "--expert-tensor-parallel-size is that of the model unless it is given"
        )
