"""What a configuration asks for, in numbers: device slots, data-parallel ranks, periodic actions."""

from dataclasses import dataclass

from slime.config.cluster import ClusterConfig
from slime.config.config import Config
from slime.errors import ConfigError


@dataclass(frozen=True)
class Slots:
    """Device slots of a run; `total` counts those that both sides share once."""

    train: int
    rollout: int
    total: int


def count_slots(cluster: ClusterConfig, *, trains: bool, rolls: bool) -> Slots:
    """Slots of a run that trains, generates, or both; colocated sides share theirs."""
    train = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node if trains else 0
    rollout = (cluster.rollout_num_gpus or 0) if rolls else 0
    total = max(train, rollout) if cluster.colocate else train + rollout
    return Slots(train, rollout, total)


def data_parallel_size(config: Config) -> int:
    """Training ranks that hold the same weights and see different samples.

    Raises:
        ConfigError: the parallel sizes do not divide the number of ranks.
    """
    world_size = config.actor_num_nodes * config.actor_num_gpus_per_node
    model_size = (
        config.tensor_model_parallel_size
        * config.pipeline_model_parallel_size
        * config.context_parallel_size
    )
    if world_size % model_size:
        raise ConfigError(
            f"tensor x pipeline x context parallel size = {model_size} does not divide "
            f"--actor-num-nodes x --actor-num-gpus-per-node = {world_size}"
        )
    return world_size // model_size


def data_parallel_rank(config: Config, rank: int) -> int:
    """Which samples training rank `rank` sees; Megatron's order: tensor, context, data, pipeline."""
    inner = config.tensor_model_parallel_size * config.context_parallel_size
    return rank // inner % data_parallel_size(config)


def micro_batch_multiple(config: Config) -> int:
    """The number of micro-batches per rank is a multiple of this: interleaved pipelines want it."""
    return config.pipeline_model_parallel_size if is_interleaved(config) else 1


def is_interleaved(config: Config) -> bool:
    """Whether a pipeline rank has several stages."""
    return (
        config.num_layers_per_virtual_pipeline_stage is not None
        or config.num_virtual_stages_per_pipeline_rank is not None
    )


def expert_tensor_size(config: Config) -> int:
    """Ranks that share each matrix of an expert."""
    return config.expert_tensor_parallel_size or config.tensor_model_parallel_size


def is_due(
    rollout_id: int, interval: int | None, per_epoch: int | None, num_rollout: int | None
) -> bool:
    """Whether a periodic action follows this round: every `interval`, at an epoch's end, at the end."""
    if interval is None:
        return False
    done = rollout_id + 1
    return done == num_rollout or any(
        period and done % period == 0 for period in (interval, per_epoch)
    )
