"""Start a stock SGLang server as an engine."""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.config.config import Config
from slime.engines.ports import hold_port
from slime.engines.rendezvous import interface_of
from slime.engines.servers import NodePart, ServerSpec, command_line
from slime.engines.sglang.invitation import RECEIVER
from slime.errors import ConfigError

_PRIVATE = 0o600
# SGLang has no compiled kernels for CPUs on PyPI: torch's own attention, and nothing overlapped. An idle
# scheduler would keep a whole core busy with looking for requests; a paused one still does.
_ON_CPU: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "dtype": "float32",
    "sleep_on_idle": True,
}
# With data-parallel attention SGLang listens at ports behind the one where the parts meet, up to 13.
MEETING_PORTS = 14


def launch(
    config: Config,
    *,
    index: int,
    host: str,
    port: int,
    log_dir: Path,
    part: NodePart | None = None,
) -> ServerSpec:
    """The command line of one SGLang server, or of its part on one of several nodes.

    A part on another node than the first answers at its health path only.

    Args:
        index: number of the engine; moves its seed for requests that bring none.
        host: address of this node.
        part: which one; None for an engine on one node.

    Raises:
        ConfigError: SGLang is not installed.
    """
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError(
            "SGLang is not installed in the environment of this node; make setup-gpu installs it, or "
            "give --rollout-engine embedded for the engine on CPUs"
        )
    on_cpu = config.device == "cpu"
    pipeline = int(config.sglang_argv.get("pp_size", 1))
    # SGLang's own choice for a checkpoint in fp32 is fp16.
    on_gpu = {"dtype": "bfloat16"} if config.bf16 is not False and not config.fp16 else {}
    options: dict[str, Any] = dict(_ON_CPU if on_cpu else on_gpu)
    options |= dict(config.sglang_argv)
    key = options.pop("api_key", None)
    loaders: Sequence[str] = options.pop("custom_weight_loader", None) or ()
    options |= {
        "model_path": config.hf_checkpoint,
        "host": host,
        "port": port,
        "random_seed": config.seed + index,
        "tp_size": config.rollout_num_gpus_per_engine // pipeline,
        "skip_server_warmup": True,
        "enable_memory_saver": bool(config.offload_rollout) and not on_cpu,
        "custom_weight_loader": [*loaders, RECEIVER],
    }
    name = f"engine-{index}"
    # A check of its health would be a request, which nobody answers in a paused engine.
    env = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if on_cpu:
        env |= _cpu_environment(options["tp_size"])
    if part is None:
        # Where its ranks meet; SGLang itself looks for a free port and listens there much later.
        options["nccl_port"] = hold_port(host)
    else:
        options |= {
            "nnodes": part.count,
            "node_rank": part.rank,
            "dist_init_addr": part.meeting,
        }
        name += f"-node-{part.rank}" if part.rank else ""
        env |= _addresses(host)
    if key:
        options["config"] = write_secret(log_dir / f"{name}.yaml", {"api-key": key})
    return ServerSpec(
        name=name,
        command=(sys.executable, "-m", "sglang.launch_server", *command_line(options)),
        url=f"http://{host}:{port}",
        health_path="/health",
        log_path=log_dir / f"{name}.log",
        env=env,
    )


def write_secret(path: Path, options: dict[str, str]) -> str:
    """Options in a file that only this user reads: everybody can read command lines.

    JSON is YAML, which SGLang's --config is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE), "w") as file:
        json.dump(options, file)
    return str(path)


def _addresses(host: str) -> dict[str, str]:
    """Environment in which a part of an engine can be reached from other nodes; what the user set stays.

    Gloo would listen at the address of the host's name, which often is one that only this node reaches,
    and SGLang's own queue at one that it guesses.
    """
    env = {"SGLANG_HOST_IP": host}
    if interface := interface_of(host):
        env["GLOO_SOCKET_IFNAME"] = interface
    return {name: text for name, text in env.items() if name not in os.environ}


def _cpu_environment(num_ranks: int) -> dict[str, str]:
    """Environment of a server, or of a part of one, whose `num_ranks` ranks in all run on CPUs."""
    env = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if num_ranks > 1:
        # Without it SGLang wants a NUMA node for each rank.
        cores = [str(rank % (os.cpu_count() or 1)) for rank in range(num_ranks)]
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
        # Torch brings NCCL where SGLang expects it on machines with cards only.
        env["SGLANG_NCCL_SO_PATH"] = os.devnull
    return env
