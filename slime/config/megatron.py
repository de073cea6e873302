"""MegatronConfig: the flags of Megatron that slime itself reads, with slime's defaults."""

from dataclasses import dataclass

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Megatron flags that slime reads.

    Every other flag of Megatron goes through `Config.megatron_argv` to Megatron's own parser.
    """

    global_batch_size: int | None = flag(
        None,
        "Rollouts per optimizer step, over all ranks; by default one step per round.",
        at_least=1,
    )
    micro_batch_size: int = flag(
        1, "Samples per forward/backward without dynamic batch size.", at_least=1
    )
    lr: float = flag(1e-6, "Learning rate.", at_least=0)
    seed: int = flag(1234, "Seed of the trainer.")
    load: str | None = flag(None, "Checkpoint to continue: a Megatron or Hugging Face folder.")
    save: str | None = flag(None, "Folder of checkpoints.")
    save_interval: int | None = flag(None, "Rounds between checkpoints.", at_least=1)
    no_save_optim: bool = flag(False, "Save no optimizer state.")
    no_load_optim: bool = flag(False, "Load no optimizer state.")
    no_load_rng: bool = flag(False, "Load no random state.")
    finetune: bool = flag(False, "Load weights only and start at round 0.")
    async_save: bool = flag(False, "Write checkpoints while training goes on.")
    eval_interval: int | None = flag(None, "Rounds between evaluations.", at_least=1)
    clip_grad: float = flag(1.0, "Largest gradient norm; 0 does not clip.", at_least=0)
    calculate_per_token_loss: bool = flag(
        False, "Mean over all tokens of a step instead of over rollouts."
    )
    bf16: bool | None = flag(None, "Train in bfloat16; by default on CUDA, unless --fp16.")
    fp16: bool = flag(False, "Train in float16.")
    tensor_model_parallel_size: int = flag(1, "Tensor parallel size.", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "Pipeline parallel size.", at_least=1)
    context_parallel_size: int = flag(1, "Context parallel size.", at_least=1)
    expert_model_parallel_size: int = flag(1, "Expert parallel size.", at_least=1)
    expert_tensor_parallel_size: int | None = flag(
        None, "Tensor parallel size of experts; by default that of the model.", at_least=1
    )
    sequence_parallel: bool = flag(False, "Sequence parallelism inside the tensor group.")
    distributed_backend: str = flag("nccl", "Backend of torch.distributed; gloo on CPU.")
    distributed_timeout_minutes: int = flag(10, "Deadline of a collective, in minutes.", above=0)
    mtp_num_layers: int | None = flag(None, "Multi-token-prediction layers.")
    mtp_loss_scaling_factor: float = flag(0.2, "Weight of the multi-token-prediction loss.")
    record_memory_history: bool = flag(False, "Record the history of GPU memory.")
    padded_vocab_size: int | None = flag(None, "Rows of the embedding after padding.")
    vocab_size: int | None = flag(None, "Rows of the embedding before padding.")
    num_layers: int | None = flag(None, "Transformer layers.")
    hidden_size: int | None = flag(None, "Width of the model.")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "Layers of a virtual pipeline stage: more than one stage per rank.", at_least=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "Virtual pipeline stages per rank.", at_least=1
    )
