"""An engine's server, or its part on one node, held by a Ray actor there."""

import threading
from dataclasses import replace
from pathlib import Path

from slime.config.config import Config
from slime.engines.ports import hold_port
from slime.engines.servers import NodePart, ServerProcess
from slime.errors import EngineUnavailable
from slime.observability.doctor import register_process
from slime.orchestration.ray_cluster import node_address
from slime.registry import ENGINES, lookup

# `stop` and `death` answer while `start` waits for the server.
ENGINE_THREADS = 2


class EngineActor:
    """Starts, watches and stops one server process; a Ray actor of ENGINE_THREADS threads.

    Args:
        rank, count: which node of the engine's this is, and how many it has.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self._rank = rank
        self._count = count
        self._server: ServerProcess | None = None
        self._starts = threading.Lock()
        self._is_stopping = False

    def meeting(self) -> str:
        """An address on this node where the parts of an engine can meet."""
        # Brings torch along; the driver, which only names this actor's class, does without.
        from slime.engines.sglang.launch import MEETING_PORTS

        host = node_address()
        return f"{host}:{hold_port(host, count=MEETING_PORTS)}"

    def start(
        self,
        config: Config,
        index: int,
        kind: str,
        log_dir: Path,
        devices: str | None,
        meeting: str | None = None,
    ) -> str:
        """Start the server, again if there was one; its address, once it answers.

        A start that still waits for the server before fails.

        Args:
            config: the whole configuration.
            index: number of the engine, for its name, seed and log.
            kind: name in the registry's table of engines.
            log_dir: folder of the run's logs.
            devices: CUDA_VISIBLE_DEVICES of the server; None on CPU.
            meeting: where the parts of an engine on several nodes meet.

        Raises:
            EngineUnavailable: the server did not come up; carries the end of its log.
            ConfigError: an option this kind of engine does not have.
        """
        name = f"engine actor {index}" + (f" node {self._rank}" if self._rank else "")
        register_process(name, log_dir.parent)
        host = node_address()
        launch = lookup(ENGINES, kind)
        part = None if meeting is None else NodePart(self._rank, self._count, meeting)
        # A port this engine never had: the router goes on asking at an old address for a while, and would
        # send requests to a new server there before it has the current weights.
        port = hold_port(host)
        spec = launch(config, index=index, host=host, port=port, log_dir=log_dir, part=part)
        if devices is not None:
            spec = replace(spec, env={**spec.env, "CUDA_VISIBLE_DEVICES": devices})
        with self._starts:
            if self._server is not None:
                self._server.kill()
            if self._is_stopping:
                raise EngineUnavailable("the run is ending: no server is started any more")
            server = self._server = ServerProcess(spec)
        server.wait_healthy(config.startup_timeout_s)
        return spec.url

    def death(self) -> str | None:
        """None while the server process runs, or how it ended."""
        if self._server is None or self._server.is_alive():
            return None
        return f"its process ended with {self._server.describe_end()}"

    def stop(self) -> None:
        """End the server process."""
        with self._starts:
            self._is_stopping = True
        if self._server is not None:
            self._server.stop()
