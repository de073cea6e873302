"""AlgoConfig: advantages, losses and corrections."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class AlgoConfig:
    """Algorithm."""

    ref_load: str | None = flag(
        None, "Checkpoint of the reference, and of the actor when --load holds none."
    )
    ref_ckpt_step: int | None = flag(None, "Iteration of the reference checkpoint.")
    save_hf: str | None = flag(
        None, "Also save in Hugging Face format here; {rollout_id} is replaced."
    )
    eps_clip: float = flag(0.2, "Lower clip: the ratio is held above 1 - eps_clip.", at_least=0)
    eps_clip_high: float | None = flag(
        None, "Upper clip; the same as --eps-clip when unset.", at_least=0
    )
    eps_clip_c: float | None = flag(
        None, "Dual clip, above 1: bounds the loss of negative advantages at -c x advantage."
    )
    value_clip: float = flag(0.2, "Clip of the critic's change.")
    kl_coef: float = flag(0.0, "KL to the reference, taken off the reward.")
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = flag("policy_loss", "Loss.")
    custom_loss_function_path: str | None = flag(
        None, "Loss of custom_loss: fn(args, batch, logits, sum_of_sample_mean)."
    )
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag("k1", "Estimator of the KL.")
    advantage_estimator: Literal[
        "grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
    ] = flag("grpo", "Advantages; ppo trains a critic.")
    disable_compute_advantages_and_returns: bool = flag(
        False, "Compute no advantages, for losses that need none."
    )
    custom_advantage_function_path: str | None = flag(
        None, "Function that fills advantages and returns: fn(args, rollout_data)."
    )
    use_kl_loss: bool = flag(False, "Add kl_loss_coef x KL(policy, reference) to the loss.")
    kl_loss_coef: float = flag(0.0, "Weight of the KL loss.")
    use_unbiased_kl: bool = flag(
        False, "Weight the KL estimate by the ratio, so that its gradient is unbiased."
    )
    ref_update_interval: int | None = flag(
        None, "Copy the actor into the reference every so many rounds."
    )
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    gamma: float = flag(1.0, "Discount.")
    lambd: float = flag(1.0, "Lambda of generalised advantage estimation.")
    normalize_advantages: bool = flag(
        False, "Whiten the advantages over all trained tokens of the round."
    )
    disable_grpo_std_normalization: bool = flag(
        False, "Do not divide rewards by the group's standard deviation (Dr. GRPO)."
    )
    disable_rewards_normalization: bool = flag(False, "Leave rewards as they are.")
    use_rollout_entropy: bool = flag(False, "Compute the entropy in the log-prob pass.")
    get_mismatch_metrics: bool = flag(
        False,
        "Report what --custom-tis-function-path measures; without --use-tis the loss stays as it is.",
    )
    reset_optimizer_states: bool = flag(False, "Zero the optimizer's moments in each round.")
    use_stateless_adam: bool = flag(False, "Adam that keeps no moments between steps.")
    use_rollout_logprobs: bool = flag(
        False, "Take the engine's log-probs as the old ones instead of recomputing."
    )
    use_tis: bool = flag(
        False, "Truncated importance sampling against the trainer/engine mismatch."
    )
    tis_clip: float = flag(2.0, "Upper bound of the TIS weight.", at_least=0)
    tis_clip_low: float = flag(0.0, "Lower bound of the TIS weight.", at_least=0)
    custom_tis_function_path: str | None = flag(
        None, "Function instead of TIS: fn(*, args, pg_loss, train_log_probs, ...)."
    )
    custom_pg_loss_reducer_function_path: str | None = flag(
        None, "Function that makes the reducer of the policy loss."
    )
    use_routing_replay: bool = flag(
        False, "Replay the experts chosen in the log-prob pass while training."
    )
    use_rollout_routing_replay: bool = flag(
        False, "Replay the experts the engine chose while training."
    )
    use_opsm: bool = flag(False, "Mask off-policy sequences with a negative advantage.")
    opsm_delta: float = flag(1e-4, "Sequence KL above which --use-opsm masks.")
    use_opd: bool = flag(False, "On-policy distillation from a teacher.")
    opd_type: Literal["sglang", "megatron"] | None = flag(None, "Where the teacher runs.")
    opd_kl_coef: float = flag(1.0, "Weight of the KL to the teacher.")
    opd_teacher_load: str | None = flag(None, "Checkpoint of a Megatron teacher.")
    opd_teacher_ckpt_step: int | None = flag(None, "Iteration of the teacher's checkpoint.")
