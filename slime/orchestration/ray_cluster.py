"""Ray: join the cluster that is there, or start one on this machine."""

import logging
import os
import tempfile
from pathlib import Path

import ray

from slime.config.cluster import ClusterConfig
from slime.errors import ConfigError, SlimeError

logger = logging.getLogger(__name__)

# A slot on CPU is one process of ours; several share a core on a laptop, so each asks Ray for a
# part of one.
CPU_PER_SLOT = 0.25
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


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
    num_cpus = max(os.cpu_count() or 1, int(num_slots * CPU_PER_SLOT + 1))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0 if cluster.device == "cpu" else None,
        include_dashboard=False,
        logging_level=logging.WARNING,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
    )
    logger.info("started a local Ray with room for %d slots", int(num_cpus / CPU_PER_SLOT))


def _joined(address: str, environment: dict[str, str]) -> bool:
    """Whether the cluster at `address` answers; then this process belongs to it.

    Raises:
        SlimeError: RAY_ADDRESS names it, so that a Ray of our own is not what the user wants.
    """
    # A Ray job has its own runtime_env, in which the user says where plugins are.
    if "PYTHONPATH" in os.environ and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
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
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def node_address() -> str:
    """Address other processes of this run reach this node by: loopback when the cluster is one node."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return "127.0.0.1" if len(addresses) == 1 else ray.util.get_node_ip_address()


def resolve_device(cluster: ClusterConfig) -> str:
    """`cpu`, the one device this release drives from end to end.

    Raises:
        ConfigError: `--device auto` on a cluster with GPUs, which would be left idle silently.
    """
    if cluster.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0:
        raise ConfigError(
            "this cluster has GPUs, and the GPU path is not built yet; give --device cpu to run on "
            "its CPUs all the same"
        )
    return "cpu" if cluster.device == "auto" else cluster.device
