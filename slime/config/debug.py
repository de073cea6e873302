"""DebugConfig: running one half alone, dumps, profiles, and the switches of CI."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Debug and profile."""

    debug_rollout_only: bool = flag(False, "Only generate: no trainer is started.")
    debug_train_only: bool = flag(False, "Only train: no engine is started.")
    save_debug_rollout_data: str | None = flag(
        None, "Write each round's samples here; {rollout_id} is replaced."
    )
    load_debug_rollout_data: str | None = flag(
        None, "Train on samples written before; implies --debug-train-only."
    )
    load_debug_rollout_data_subsample: float | None = flag(
        None, "Take only this part of the loaded samples."
    )
    load_forge_rollout_data: str | None = flag(None, "Replay recorded rollouts through engines.")
    save_debug_train_data: str | None = flag(None, "Write each round's train data here.")
    dump_details: str | None = flag(None, "Folder for both dumps, rollout and train data.")
    memory_snapshot_dir: str = flag(".", "Folder of memory snapshots.")
    memory_snapshot_num_steps: int | None = flag(None, "Steps after which a snapshot is taken.")
    profile_target: tuple[Literal["train_overall", "train_actor", "train_log_probs"], ...] = flag(
        ("train_overall",), "What the torch profiler covers."
    )
    memory_recorder: Literal["torch", "memray"] = flag("torch", "Recorder of memory history.")
    http_proxy: str | None = flag(None, "Proxy of HTTP requests.")
    use_distributed_post: bool = flag(False, "Send HTTP requests from actors on every node.")
    ci_test: bool = flag(False, "Stop when a number leaves the range CI allows.")
    ci_disable_kl_checker: bool = flag(False, "Leave out CI's check of the first step's KL.")
    ci_train_rollout_logprob_abs_diff_threshold: float = flag(
        0.1, "Largest train/rollout log-prob difference CI allows."
    )
    ci_save_grad_norm: str | None = flag(
        None, "Write gradient norms here; {role}, {rollout_id} and {step_id} are replaced."
    )
    ci_load_grad_norm: str | None = flag(None, "Compare gradient norms with these files.")
