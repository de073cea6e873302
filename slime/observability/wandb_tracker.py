"""Metrics to Weights & Biases, by the `wandb` package, which is asked for only by --use-wandb."""

import json
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from slime.config.config import Config
from slime.errors import ConfigError
from slime.observability.trackers import StepKey

DEFAULT_PROJECT = "slime"
# Which step is the x axis of which metrics; a pattern ends in its only star.
AXES: dict[str, StepKey] = {
    "rollout/*": "rollout/step",
    "perf/*": "rollout/step",
    "train/*": "train/step",
    "eval/*": "eval/step",
}
_ID_FILE = "wandb_run_id"
_INIT_TIMEOUT_S = 90
_FINISH_TIMEOUT_S = 60


class WandbTracker:
    """One run of W&B; started again in the same run folder it goes on in the same run.

    Args:
        folder: of the run; keeps the id of the W&B run, and its files unless --wandb-dir is given.

    Raises:
        ConfigError: W&B refused or cannot be reached.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        wandb: Any = import_module("wandb")
        run_id = _run_id(config, folder)
        try:
            self._run: Any = wandb.init(**_arguments(config, folder, run_id, wandb.Settings))
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise ConfigError(
                f"--use-wandb: W&B could not start: {error}. Log in with `wandb login`, check "
                "--wandb-host and --wandb-team, or give --wandb-mode offline, which needs no network."
            ) from error
        self._train_step = 0
        self._only_train_step = config.wandb_always_use_train_step
        if self._only_train_step:
            self._run.define_metric("*", step_metric="train/step")
            return
        for step_key in dict.fromkeys(AXES.values()):
            self._run.define_metric(step_key)
        for pattern, step_key in AXES.items():
            self._run.define_metric(pattern, step_metric=step_key)

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        row: dict[str, float] = {**metrics, step_key: step}
        if step_key == "train/step":
            self._train_step = step
        elif self._only_train_step:
            # A round's row follows its optimizer steps, so the last of them is the place.
            row["train/step"] = self._train_step
        self._run.log(row)

    def close(self) -> None:
        self._run.finish()


def _arguments(config: Config, folder: Path, run_id: str, settings: Any) -> dict[str, Any]:
    """What `wandb.init` is told."""
    group = config.wandb_group or folder.name
    name = group if config.disable_wandb_random_suffix else f"{group}_{run_id}"
    options: dict[str, Any] = {
        "console": "off",  # the run folder has the logs, and the live view owns the terminal
        "x_disable_meta": True,  # it would send the command line, with the keys in it
        "silent": True,
        "init_timeout": _INIT_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
    }
    if config.wandb_key is not None:
        options["api_key"] = config.wandb_key
    if config.wandb_host is not None:
        options["base_url"] = config.wandb_host
    known = settings.model_fields  # finish_timeout is young
    return {
        "project": config.wandb_project or DEFAULT_PROJECT,
        "entity": config.wandb_team,
        "group": group,
        "name": name,
        "id": run_id,
        "resume": "allow",
        "dir": config.wandb_dir or str(folder),
        "mode": config.wandb_mode,
        "config": json.loads(config.to_json()),
        "save_code": False,
        "settings": settings(**{key: value for key, value in options.items() if key in known}),
    }


def _run_id(config: Config, folder: Path) -> str:
    """--wandb-run-id, else the id this folder's run has had, else a new one; kept in the folder."""
    path = folder / _ID_FILE
    found = config.wandb_run_id
    if found is None and path.is_file():
        found = path.read_text(encoding="utf-8").strip() or None
    run_id = found or secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id
