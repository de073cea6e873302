"""Copies of the weights on the engines' hosts, each kept by a Ray actor there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.errors import SlimeError, WeightSyncError
from slime.orchestration.waiting import wait_for
from slime.weights.local_copy import Stale, bring


class CopyKeeper:
    """Ray actor on a host with engines."""

    def bring(self, version: Path, local_dir: str) -> str | None:
        """Make the copy that version; None, or why a whole version is needed for it."""
        try:
            bring(version, local_dir)
        except Stale as reason:
            return str(reason)
        return None


class HostCopies:
    """As `slime.weights.disk.Copies`: one copy on each host, however many engines it has.

    Args:
        urls: of the engines.
        local_dir: `--update-weight-local-checkpoint-dir`.
        timeout_s: deadline of one version on all hosts, seconds.

    Raises:
        WeightSyncError: an engine is on no node of the Ray cluster.
    """

    def __init__(self, urls: Sequence[str], local_dir: str, *, timeout_s: float) -> None:
        self.local_dir = local_dir
        self._timeout_s = timeout_s
        make: Any = ray.remote(CopyKeeper)
        self._keepers = {
            f"the copy of the weights on {node['NodeManagerAddress']}": make.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in _nodes_of(urls)
        }

    def bring(self, version: Path) -> list[str]:
        """As `Copies`."""
        calls = {
            name: keeper.bring.remote(version, self.local_dir)
            for name, keeper in self._keepers.items()
        }
        try:
            answers = wait_for(calls, action=f"become {version.name}", timeout_s=self._timeout_s)
        except SlimeError as error:
            raise WeightSyncError(f"weight sync failed: {error}") from error
        return [
            f"{name}: {answer}"
            for name, answer in zip(self._keepers, answers, strict=True)
            if answer is not None
        ]

    def close(self) -> None:
        """End the actors; the copies stay."""
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers = {}


def _nodes_of(urls: Sequence[str]) -> list[dict[str, Any]]:
    """The nodes of the Ray cluster that these engines are on, each once."""
    nodes: dict[str, dict[str, Any]] = {
        node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]
    }
    if len(nodes) == 1:  # its engines listen on loopback
        return list(nodes.values())
    hosts = dict.fromkeys(str(urlsplit(url).hostname) for url in urls)
    if unknown := [host for host in hosts if host not in nodes]:
        raise WeightSyncError(
            f"--update-weight-local-checkpoint-dir: {', '.join(unknown)} is no node of the Ray cluster, so nothing "
            "can keep a copy of the weights there; leave the flag out, or start Ray on it"
        )
    return [nodes[host] for host in hosts]
