"""How to start the embedded CPU engine as a server process of its own."""

import sys
from pathlib import Path

from slime.config.api_key import API_KEY_VARIABLE
from slime.config.config import Config
from slime.config.states import EMBEDDED_ENGINE_OPTIONS
from slime.engines.servers import NodePart, ServerSpec, command_line
from slime.errors import ConfigError


def launch(
    config: Config,
    *,
    index: int,
    host: str,
    port: int,
    log_dir: Path,
    part: NodePart | None = None,
) -> ServerSpec:
    """The command line of one embedded engine.

    Args:
        index: number of the engine; moves its seed for requests that bring none.
        part: None: this engine is one process.

    Raises:
        ConfigError: an `--sglang-*` option that only SGLang has.
    """
    assert part is None
    unknown = sorted(set(config.sglang_argv) - set(EMBEDDED_ENGINE_OPTIONS))
    if unknown:
        names = ", ".join("--sglang-" + name.replace("_", "-") for name in unknown)
        known = ", ".join("--sglang-" + name.replace("_", "-") for name in EMBEDDED_ENGINE_OPTIONS)
        raise ConfigError(
            f"the embedded CPU engine has no {names}; it knows {known}. Leave them out on a CPU."
        )
    options = dict(config.sglang_argv)
    options |= {
        "model_path": config.hf_checkpoint,
        "host": host,
        "port": port,
        "random_seed": config.seed + index,
    }
    key = options.pop("api_key", None)
    return ServerSpec(
        name=f"engine-{index}",
        command=(sys.executable, "-m", "slime.engines.embedded.server", *command_line(options)),
        url=f"http://{host}:{port}",
        health_path="/health",
        log_path=log_dir / f"engine-{index}.log",
        # Two torch threads are many times slower than one when cores are shared.
        env={"OMP_NUM_THREADS": "1"} | ({API_KEY_VARIABLE: str(key)} if key else {}),
    )
