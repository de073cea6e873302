"""All engines of a run and the router in front of them."""

import logging
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from slime.config.config import Config
from slime.engines.control import EngineControl
from slime.engines.router import Router
from slime.orchestration.engine_actor import EngineActor
from slime.orchestration.placement import Placement
from slime.orchestration.ray_cluster import node_address
from slime.orchestration.waiting import wait_for

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0


class EngineFleet:
    """Engine actors, one per server, and the router. Lives in the rollout manager.

    Args:
        config: the whole configuration.
        placement: slots; engine i takes the slots i x size … (i + 1) x size - 1 of `rollout_slots`.
        log_dir: folder of the run's logs.
    """

    def __init__(self, config: Config, placement: Placement, log_dir: Path) -> None:
        self._config = config
        self._log_dir = log_dir
        size = config.rollout_num_gpus_per_engine
        kind = engine_kind(config, placement.device)
        make: Any = ray.remote(EngineActor)
        self._actors: dict[str, ActorHandle[EngineActor]] = {
            f"engine {i}": make.options(**placement.options(slot)).remote()
            for i, slot in enumerate(placement.rollout_slots[::size])
        }
        # They come up (seconds of imports) while the router and the trainers do.
        self._starts = {
            name: actor.start.remote(config, i, kind, log_dir)
            for i, (name, actor) in enumerate(self._actors.items())
        }
        self._router: Router | None = None
        self.urls: list[str] = []
        self._infos: list[dict[str, Any]] = []

    def start(self) -> None:
        """Bring up router and engines and register one with the other.

        Raises:
            EngineUnavailable: a server did not come up; carries the end of its log.
            DeadlineExceeded: an engine's actor did not answer.
        """
        timeout_s = self._config.startup_timeout_s
        self._router = self._make_router(timeout_s)
        # A little longer than the actors' own deadline, whose message tells more.
        self.urls = wait_for(self._starts, action="start its server", timeout_s=timeout_s + 30.0)
        if self.urls:
            self._router.add_engines(self.urls, timeout_s)
            control = EngineControl(self.urls, timeout_s=timeout_s)
            self._infos = control.get_all("/server_info")
            control.close()
        logger.info(
            "router %s in front of %d engines: %s",
            self._router.url,
            len(self.urls),
            ", ".join(self.urls),
        )

    @property
    def router_address(self) -> tuple[str, int]:
        """Host and port of the router."""
        if self._router is None:
            raise RuntimeError("the fleet has not been started")
        host, port = self._router.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    @property
    def supports_group_seeds(self) -> bool:
        """Whether one request can ask every engine for n answers with a seed each (top-level `sampling_seeds`)."""
        return bool(self.urls) and all(
            info.get("slime_engine") == "embedded" for info in self._infos
        )

    def stop(self) -> None:
        """End all servers."""
        if self._router is not None:
            self._router.stop()
        stops = {name: actor.stop.remote() for name, actor in self._actors.items()}
        wait_for(stops, action="stop its server", timeout_s=STOP_TIMEOUT_S)

    def _make_router(self, timeout_s: float) -> Router:
        config = self._config
        if config.sglang_router_ip is not None:
            return Router(f"http://{config.sglang_router_ip}:{config.sglang_router_port}")
        options = dict(config.router_argv)
        if config.sglang_router_port is not None:
            options["port"] = config.sglang_router_port
        return Router.start(
            host=node_address(),
            log_path=self._log_dir / "router.log",
            options=options,
            request_timeout_s=config.sglang_router_request_timeout_secs,
            timeout_s=timeout_s,
        )


def engine_kind(config: Config, device: str) -> str:
    """`--rollout-engine`, or what suits the device: sglang on CUDA, embedded on CPU."""
    if config.rollout_engine != "auto":
        return config.rollout_engine
    return "sglang" if device == "cuda" else "embedded"
