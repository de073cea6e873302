"""Metrics to trackio, a small dashboard that keeps its data on this machine by default."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from slime.config.config import Config
from slime.observability.trackers import StepKey
from slime.plugins import accepts_keyword

DEFAULT_PROJECT = "slime"


class TrackioTracker:
    """One run of trackio, named as the run folder, so that a resumed run goes on in it.

    `trackio show` opens the dashboard; the data lies where TRACKIO_DIR says.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        trackio: Any = import_module("trackio")
        # Newer releases measure the machine too, which is not what a run's metrics are.
        quiet = {
            name: False
            for name in ("auto_log_cpu", "auto_log_gpu")
            if accepts_keyword(trackio.init, name)
        }
        self._run: Any = trackio.init(
            project=config.trackio_project or DEFAULT_PROJECT,
            name=folder.name,
            space_id=config.trackio_space_id,
            config=json.loads(config.to_json()),
            resume="allow",
            embed=False,
            **quiet,
        )

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        # trackio has one axis; each metric is logged on one only, so they do not meet.
        self._run.log({**metrics, step_key: step}, step=step)

    def close(self) -> None:
        self._run.finish()
