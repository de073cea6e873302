"""ObservabilityConfig: where metrics, samples and logs go."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """Tracking."""

    run_dir: str | None = flag(None, "Folder of this run; by default runs/<start time>.")
    keep_rounds: bool = flag(
        False,
        "Keep every recorded round in the run folder, not only those since the checkpoint before "
        "the last.",
    )
    live_view: bool | None = flag(
        None,
        "Show progress at the foot of the terminal; by default when stderr is a terminal and "
        "neither CI nor NO_COLOR is set.",
    )
    samples_per_rollout_logged: int = flag(
        8, "Samples per round written to the run folder.", at_least=0
    )
    use_wandb: bool = flag(False, "Send metrics to Weights & Biases.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = flag(
        None, "Mode of wandb; offline needs no network, `wandb sync` sends its files later."
    )
    wandb_dir: str | None = flag(None, "Folder of wandb's files; by default the run's.")
    wandb_key: str | None = flag(
        None, "API key of wandb; `wandb login` or WANDB_API_KEY keep it off the command line."
    )
    wandb_host: str | None = flag(None, "Address of the wandb server.")
    wandb_team: str | None = flag(None, "Team of wandb.")
    wandb_group: str | None = flag(
        None, "Group of wandb, and the run's name; by default the run folder's name."
    )
    wandb_project: str | None = flag(None, "Project of wandb; by default slime.")
    disable_wandb_random_suffix: bool = flag(
        False, "Name the wandb run by its group alone, without its id."
    )
    wandb_always_use_train_step: bool = flag(False, "The train step is the axis of all metrics.")
    wandb_run_id: str | None = flag(
        None, "Run of wandb to continue; by default the one this run folder has had."
    )
    use_trackio: bool = flag(False, "Send metrics to trackio, a dashboard on this machine.")
    trackio_project: str | None = flag(None, "Project of trackio; by default slime.")
    trackio_space_id: str | None = flag(
        None, "Hugging Face Space that trackio sends to; by default nothing leaves this machine."
    )
    log_multi_turn: bool = flag(False, "Log lengths and rounds of multi-turn samples.")
    log_passrate: bool = flag(False, "Log pass@k of each round.")
    log_reward_category: str | None = flag(
        None, "Log the share of each value of this key of the reward dict."
    )
    log_correct_samples: bool = flag(False, "Log lengths of the correct samples apart.")
    use_tensorboard: bool = flag(
        False, "Write metrics for TensorBoard too; folder by TENSORBOARD_DIR, else the run's."
    )
    tb_project_name: str | None = flag(None, "Project: a folder of TensorBoard's files.")
    tb_experiment_name: str | None = flag(None, "Experiment: a folder inside the project's.")
