"""One engine server, held by a Ray actor on the server's node."""

from dataclasses import replace
from pathlib import Path

from slime.config.config import Config
from slime.engines.servers import ServerProcess, free_port
from slime.errors import EngineUnavailable
from slime.observability.doctor import register_process
from slime.orchestration.ray_cluster import node_address
from slime.registry import ENGINES, lookup

# `stop` and `death` answer while `start` waits for the server.
ENGINE_THREADS = 2


class EngineActor:
    """Starts, watches and stops one engine's server process; a Ray actor of ENGINE_THREADS threads."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._used_ports: set[int] = set()
        self._is_stopping = False

    def start(
        self, config: Config, index: int, kind: str, log_dir: Path, devices: str | None
    ) -> str:
        """Start the server, again if there was one; its address, once it answers.

        Args:
            config: the whole configuration.
            index: number of the engine, for its name, seed and log.
            kind: name in the registry's table of engines.
            log_dir: folder of the run's logs.
            devices: CUDA_VISIBLE_DEVICES of the server; None on CPU.

        Raises:
            EngineUnavailable: the server did not come up; carries the end of its log.
            ConfigError: an option this kind of engine does not have.
        """
        if self._server is not None:
            self._server.kill()
        if self._is_stopping:
            raise EngineUnavailable("the run is ending: no server is started any more")
        register_process(f"engine actor {index}", log_dir.parent)
        host = node_address()
        launch = lookup(ENGINES, kind)
        spec = launch(config, index=index, host=host, port=self._fresh_port(host), log_dir=log_dir)
        if devices is not None:
            spec = replace(spec, env={**spec.env, "CUDA_VISIBLE_DEVICES": devices})
        self._server = ServerProcess(spec)
        self._server.wait_healthy(config.startup_timeout_s)
        return spec.url

    def death(self) -> str | None:
        """None while the server process runs, or how it ended."""
        if self._server is None or self._server.is_alive():
            return None
        return f"its process ended with {self._server.describe_end()}"

    def stop(self) -> None:
        """End the server process."""
        self._is_stopping = True
        if self._server is not None:
            self._server.stop()

    def _fresh_port(self, host: str) -> int:
        """A port this engine never had.

        The router goes on asking at an old address for a while, and would send requests to a new
        server there before it has the current weights.
        """
        while (port := free_port(host)) in self._used_ports:
            pass
        self._used_ports.add(port)
        return port
