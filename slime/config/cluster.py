"""ClusterConfig: which machines and device slots the trainer and the engines get."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Cluster and backend.

    On CPU a "GPU" in the counts is a device slot, that is, one process.
    """

    train_backend: Literal["megatron"] = flag("megatron", "Training backend.")
    device: Literal["auto", "cuda", "cpu"] = flag(
        "auto", "Device of trainer and engines; auto takes CUDA when the cluster has GPUs."
    )
    actor_num_nodes: int = flag(1, "Nodes that train.", at_least=1)
    actor_num_gpus_per_node: int = flag(8, "Device slots per training node.", at_least=1)
    rollout_num_gpus: int | None = flag(
        None,
        "Device slots of all engines together; with --colocate the trainer's number when unset; "
        "0 starts only the router.",
        at_least=0,
    )
    rollout_num_gpus_per_engine: int = flag(
        1,
        "Device slots of one engine: its TP x PP size. Above --num-gpus-per-node it takes whole nodes.",
        at_least=1,
    )
    num_gpus_per_node: int = flag(
        8, "Device slots of a node, for placing engines; set it below 8.", at_least=1
    )
    colocate: bool = flag(
        False,
        "Trainer and engines share device slots and take turns; or work at once where neither is offloaded.",
    )
    offload: bool = flag(False, "Both --offload-train and --offload-rollout.")
    offload_train: bool | None = flag(
        None,
        "Move the trainer out of GPU memory while engines generate; on with --colocate.",
    )
    offload_rollout: bool | None = flag(
        None,
        "Release the engines' GPU memory while the trainer trains; on with --colocate.",
    )
    num_critic_only_steps: int = flag(0, "The first N rollouts train only the critic.")
    megatron_config_path: str | None = flag(
        None, "YAML with per-role overrides of Megatron flags: megatron: [{name, role, overrides}]."
    )
    startup_timeout_s: float = flag(
        600.0, "Deadline for engines, router and train actors to come up, in seconds.", above=0
    )
    custom_config_path: str | None = flag(
        None, "YAML of further settings, applied over the command line before any check."
    )
