"""One engine server, held by a Ray actor on the server's node."""

from pathlib import Path

from slime.config.config import Config
from slime.engines.servers import ServerProcess, free_port
from slime.orchestration.ray_cluster import node_address
from slime.registry import ENGINES, lookup


class EngineActor:
    """Starts, watches and stops one engine's server process."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None

    def start(self, config: Config, index: int, kind: str, log_dir: Path) -> str:
        """Start the server; its address, once it answers.

        Args:
            config: the whole configuration.
            index: number of the engine, for its name, seed and log.
            kind: name in the registry's table of engines.
            log_dir: folder of the run's logs.

        Raises:
            EngineUnavailable: the server did not come up; carries the end of its log.
            ConfigError: an option this kind of engine does not have.
        """
        host = node_address()
        launch = lookup(ENGINES, kind)
        spec = launch(config, index=index, host=host, port=free_port(host), log_dir=log_dir)
        self._server = ServerProcess(spec)
        self._server.wait_healthy(config.startup_timeout_s)
        return spec.url

    def is_alive(self) -> bool:
        """Whether the server process runs."""
        return self._server is not None and self._server.is_alive()

    def stop(self) -> None:
        """End the server process."""
        if self._server is not None:
            self._server.stop()
