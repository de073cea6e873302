"""Trackers that are somebody else's service, as the flags ask for: W&B and trackio."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from slime.config.config import Config
from slime.errors import ConfigError
from slime.observability.trackers import Guarded, Tracker
from slime.observability.trackio_tracker import TrackioTracker
from slime.observability.wandb_tracker import WandbTracker


def open_services(config: Config, folder: Path) -> list[Tracker]:
    """A guarded tracker for each service that is asked for.

    Args:
        folder: of the run.

    Raises:
        ConfigError: a package is not installed, or the service refuses.
    """
    services: list[Tracker] = []
    if config.use_wandb:
        services.append(_opened("wandb", lambda: WandbTracker(config, folder)))
    if config.use_trackio:
        services.append(_opened("trackio", lambda: TrackioTracker(config, folder)))
    return services


def _opened(name: str, make: Callable[[], Tracker]) -> Tracker:
    if find_spec(name) is None:
        raise ConfigError(
            f"--use-{name} needs the Python package {name}, which is not installed: run "
            f"`pip install {name}` in slime's environment, or leave --use-{name} out. "
            "metrics.jsonl is written in any case."
        )
    return Guarded(name, make())
