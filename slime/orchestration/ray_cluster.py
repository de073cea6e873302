"""Ray: join the cluster that is there, or start one on this machine."""

import json
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import ray

from slime.config.api_key import API_KEY_VARIABLE, run_api_key
from slime.config.cluster import ClusterConfig
from slime.errors import SlimeError

logger = logging.getLogger(__name__)

# A slot on CPU is one process of ours; several share a core on a laptop, so each asks Ray for a
# part of one.
CPU_PER_SLOT = 0.25
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
_PRIVATE = 0o700
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def connect(cluster: ClusterConfig, num_slots: int) -> None:
    """Join the Ray cluster of RAY_ADDRESS or of `ray start`; start a local one if there is neither.

    Args:
        cluster: for `--device`.
        num_slots: training ranks plus engine devices, so that a local Ray has room for them.
    """
    if ray.is_initialized():
        return
    environment = worker_environment(cluster)
    address = running_cluster()
    if address is not None and _joined(address, environment):
        return
    # Workers inherit this process's environment: cheaper than a runtime_env, which wants an agent.
    os.environ.update(environment)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers niceness 15: trainer and engines would get a thirtieth of what any busy
    # program on the machine gets, and miss deadlines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray listens on every interface and asks for a token; its own one lies in ~/.ray/auth_token,
    # which other users can often read. Ours is in no file.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A slot with a GPU asks for a whole core.
    needed = int(num_slots * CPU_PER_SLOT) if cluster.device == "cpu" else num_slots
    num_cpus = max(os.cpu_count() or 1, needed + 1)
    _start_local(num_cpus, cluster)
    logger.info("started a local Ray with room for %d slots", int(num_cpus / CPU_PER_SLOT))


def _start_local(num_cpus: int, cluster: ClusterConfig) -> None:
    """A Ray of our own; tried twice, because Ray gives its node 30 seconds and a busy machine may need more."""
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=0 if cluster.device == "cpu" else None,
                include_dashboard=False,
                logging_level=logging.WARNING,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=private_ray_folder(),
            )
            return
        except Exception as error:  # Ray raises a bare one
            ray.shutdown()
            if is_last or "timed out during startup" not in str(error):
                raise SlimeError(
                    f"Ray did not start on this machine: {error} A machine that is very busy needs "
                    "another try."
                ) from error
            logger.warning("Ray did not start within its 30 seconds; trying once more")


def _joined(address: str, environment: dict[str, str]) -> bool:
    """Whether the cluster at `address` answers; then this process belongs to it.

    Raises:
        SlimeError: RAY_ADDRESS names it, so that a Ray of our own is not what the user wants.
    """
    if JOB_CONFIG_VARIABLE in os.environ:
        # A Ray job has its own runtime_env, in which the user says where plugins are; a variable that
        # stands in both would be an error.
        given = job_variables(os.environ[JOB_CONFIG_VARIABLE])
        environment = {name: text for name, text in environment.items() if name not in given}
    elif "PYTHONPATH" in os.environ:
        folders = os.environ["PYTHONPATH"].split(os.pathsep)
        environment |= {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, folders)))}
    try:
        ray.init(
            address=address, runtime_env={"env_vars": environment}, logging_level=logging.WARNING
        )
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise SlimeError(
                f"RAY_ADDRESS names the Ray cluster {address}, which does not let this process in: "
                f"{error}. Is it running? A cluster that asks for a token (the log above says so) "
                "needs RAY_AUTH_MODE=token; unset RAY_ADDRESS to start Ray on this machine."
            ) from None
        logger.warning("the last `ray start` here left %s, where nothing answers", address)
        return False
    logger.info("joined the Ray cluster at %s", address)
    return True


def job_variables(job_config: str) -> set[str]:
    """Names of the environment variables that a Ray job was submitted with.

    Args:
        job_config: what Ray tells its driver, as JSON.
    """
    runtime_env: dict[str, Any] = json.loads(job_config).get("runtime_env") or {}
    return set(runtime_env.get("env_vars") or {})


def private_ray_folder() -> str | None:
    """Where a local Ray keeps logs and sockets: below a folder of this user alone.

    Ray lets everybody write into its own folder. None: RAY_TMPDIR names another place.
    """
    if "RAY_TMPDIR" in os.environ:
        return None
    # Paths of sockets must be short, those of TMPDIR on clusters are not.
    parent = "/tmp" if sys.platform == "linux" else tempfile.gettempdir()
    folder = Path(parent) / f"slime-{os.getuid()}"
    folder.mkdir(mode=_PRIVATE, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        folder = Path(tempfile.mkdtemp(prefix="slime-"))
    return str(folder / "ray")


def running_cluster() -> str | None:
    """Address of the cluster to join: RAY_ADDRESS, or what the last `ray start` here wrote down.

    Not `address="auto"`: that also finds the private Ray of another run on this machine, which ends
    with that run.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    noted = (
        Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    )
    return noted.read_text().strip() or None if noted.is_file() else None


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of every actor: one torch thread (two are many times slower on shared cores)."""
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    if key := run_api_key():
        environment[API_KEY_VARIABLE] = key
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def node_address() -> str:
    """Address other processes of this run reach this node by: loopback when the cluster is one node."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return "127.0.0.1" if len(addresses) == 1 else ray.util.get_node_ip_address()


def resolve_device(cluster: ClusterConfig) -> Literal["cpu", "cuda"]:
    """`cpu` or `cuda`; of `auto`, CUDA where the cluster has GPUs."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
