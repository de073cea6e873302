"""EnvironmentsConfig: environments that the model plays in, turn by turn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.config.fields import flag

# The generate function that --environment-path implies.
ENVIRONMENT_GENERATE = "slime.environments.generate.generate"


@dataclass(frozen=True, kw_only=True)
class EnvironmentsConfig:
    """Environments."""

    environment_path: str | None = flag(
        None,
        "Class or function that makes the environment of one episode: fn(settings); "
        "--custom-generate-function-path is then slime.environments.generate.generate.",
    )
    environment_args: Mapping[str, Any] = flag(
        {}, "Settings it gets; a row's metadata.environment_args go first."
    )
    environment_max_turns: int | None = flag(
        None, "Turns of one episode; unset: as many as fit into the response.", at_least=1
    )
    environment_timeout_s: float = flag(
        60.0, "Seconds an environment has to be made, to begin, or to answer one turn.", above=0
    )
