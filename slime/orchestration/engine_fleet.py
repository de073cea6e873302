"""All engines of a run and the router in front of them."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from slime.config.api_key import run_api_key
from slime.config.checkpoints import read_whole_hf_config
from slime.config.config import Config
from slime.config.engine_rules import external_urls
from slime.engines.control import EngineControl
from slime.engines.external import Wanted
from slime.engines.gate import gate
from slime.engines.health import HealthWatch
from slime.engines.protocol import MemoryTag, PauseMode
from slime.engines.router import Router
from slime.errors import EngineUnavailable
from slime.orchestration.engine_actor import ENGINE_THREADS, EngineActor
from slime.orchestration.engine_host import RayEngineHost
from slime.orchestration.engine_watch import DEATH_SHOWS_S, Engine, EngineWatch, Server
from slime.orchestration.external_host import ExternalHost
from slime.orchestration.placement import Placement, engine_kind
from slime.orchestration.ray_cluster import node_address
from slime.orchestration.waiting import wait_for

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0
# Each look costs a call of every engine's actor, which may share its cores with the engines.
POLL_S = 1.0
HOLD_S = 2.0
END_AGAIN_S = 0.1


class EngineFleet:
    """Engine actors, one per server process, the router, and the watch over them.

    Lives in the rollout manager.

    Args:
        config: the whole configuration.
        placement: slots; engine i takes the slots i x size … (i + 1) x size - 1 of `rollout_slots`.
        log_dir: folder of the run's logs.

    Attributes:
        urls: addresses of the engines that serve; the same list all the time.
    """

    def __init__(self, config: Config, placement: Placement, log_dir: Path) -> None:
        self._config = config
        self._placement = placement
        self._log_dir = log_dir
        size = config.rollout_num_gpus_per_engine
        slots = placement.rollout_slots
        # They come up (seconds of imports) while the router and the trainers do.
        self._hosts: dict[str, RayEngineHost | ExternalHost] = {
            f"engine {i}": self._make_host(i, slots[i * size : (i + 1) * size])
            for i in range(len(slots) // size)
        }
        if urls := external_urls(config):
            wanted = _wanted(config)
            for i, url in enumerate(urls):
                self._hosts[f"external engine {i}"] = ExternalHost(url, wanted)
        self._health = _health_watch(config)
        self._router: Router | None = None
        self._watch: EngineWatch | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="engine-watch", daemon=True)
        self.urls: list[str] = []
        self._infos: list[dict[str, Any]] = []
        self._away: tuple[str, ...] = ()

    def start(self) -> None:
        """Bring up router and engines, register one with the other, and begin to watch them.

        Raises:
            EngineUnavailable: a server did not come up; carries the end of its log.
            ConfigError: an engine that somebody else runs does not fit.
            DeadlineExceeded: an engine's actor did not answer.
        """
        timeout_s = self._config.startup_timeout_s
        deadline = time.monotonic() + timeout_s
        self._router = self._make_router(timeout_s)
        starts = {name: ref for host in self._hosts.values() for name, ref in host.starting.items()}
        # A little longer than the actors' own deadline, whose message tells more.
        wait_for(starts, action="start its server", timeout_s=timeout_s + 30.0)
        urls = [host.first_url(deadline - time.monotonic()) for host in self._hosts.values()]
        if urls:
            self._router.add_engines(urls, timeout_s)
            control = EngineControl(urls, timeout_s=timeout_s)
            self._infos = control.get_all("/server_info")
            if self._config.offload_rollout and engine_kind(self._config) == "sglang":
                self._note_weights(control)
            control.close()
        self._watch = EngineWatch(
            [Engine(name, host) for name, host in self._hosts.items()],
            self._router,
            needs_weights=not self._config.debug_rollout_only,
            health=self._health,
            timeout_s=timeout_s,
        )
        self._watch.all_serve(urls)
        self.urls = self._watch.urls
        self._thread.start()
        logger.info(
            "router %s in front of %d engines: %s", self._router.url, len(urls), ", ".join(urls)
        )

    def _note_weights(self, control: EngineControl) -> None:
        """Let each engine remember the checksums of the weights it loaded, for the first sync."""
        # Brings torch along; the driver, which only names the rollout manager's class, does without.
        from slime.engines.sglang.invitation import note, request

        sizes = [int(info.get("tp_size") or 1) for info in self._infos]
        control.post_all(
            "/update_weights_from_tensor",
            lambda engine: request([note(rank) for rank in range(sizes[engine])], flush=False),
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
        return bool(self._infos) and all(
            info.get("slime_engine") == "embedded" for info in self._infos
        )

    @property
    def heeds_seeds(self) -> bool:
        """Whether `sampling_seed` decides answers of any engine: SGLang's need --enable-deterministic-inference."""
        return not self._infos or any(
            info.get("slime_engine") == "embedded" or info.get("enable_deterministic_inference")
            for info in self._infos
        )

    @property
    def waiting(self) -> tuple[Server, ...]:
        """Engines that came back and lack the current weights."""
        return self._watch.waiting if self._watch is not None else ()

    @property
    def failure(self) -> str | None:
        """Why an engine or the router is not started again any more; None while all is well."""
        return self._watch.failure if self._watch is not None else None

    @contextmanager
    def in_round(self) -> Iterator[None]:
        """Requests are on their way inside: check for servers that hang, if that was asked for."""
        watch = self._started_watch()
        watch.round_begins()
        try:
            yield
        finally:
            watch.round_ends()

    def bring_up(self) -> tuple[Server, ...]:
        """The engines that are up; waits and raises as `EngineWatch.bring_up`."""
        return self._started_watch().bring_up(self._config.startup_timeout_s)

    def admit(self, servers: Sequence[Server]) -> None:
        """Let engines that now have the current weights serve."""
        self._started_watch().admit(servers)

    def take_metrics(self) -> dict[str, float]:
        """Restarts since the last call; nothing when there were none."""
        return self._watch.take_metrics() if self._watch is not None else {}

    def hold_requests(self) -> None:
        """Keep this process's requests back until `let_requests_go`, and end those that run, for new weights.

        Those that have not ended after HOLD_S are left to the pause of the engines.
        """
        gate.close()
        deadline = time.monotonic() + HOLD_S
        control = EngineControl(tuple(self.urls), timeout_s=HOLD_S)
        # Some that passed the gate have not reached their engine when the first call does.
        while not gate.wait_none(0.0) and time.monotonic() < deadline:
            # One that does not answer is the business of the sync that comes.
            control.start_post_all("/abort_request", {"abort_all": True})
            gate.wait_none(END_AGAIN_S)
        control.close()

    def let_requests_go(self) -> None:
        """The engines have their weights."""
        gate.open()

    def release_memory(self, *tags: MemoryTag) -> None:
        """Let the engines give up these parts of their memory, all without tags.

        What still runs there ends: nobody waits for it any more (requests that the router sent again
        when an engine died). They stay paused until their cache is back: SGLang ends itself when a
        request reaches memory that is away, and when memory in use is to be released.
        One that died meanwhile, or comes up after this, keeps its memory until the next time.
        """
        body = {"tags": [tag.value for tag in tags]} if tags else {}
        urls = self._post("/pause_generation", {"mode": PauseMode.ABORT.value}, tuple(self.urls))
        self._away = self._post("/release_memory_occupation", body, urls)

    def resume_memory(self, *tags: MemoryTag) -> None:
        """Let them take it back: weights with values that are to be overwritten, the rest empty.

        With the cache all engines go on, also those that came up after the others had left: a weight
        sync in between leaves all of them paused.
        """
        body = {"tags": [tag.value for tag in tags]}
        self._away = self._post("/resume_memory_occupation", body, self._away)
        if MemoryTag.KV_CACHE in tags:
            urls = dict.fromkeys((*self._away, *self.urls))
            self._post("/continue_generation", {}, tuple(urls))

    def _post(self, path: str, body: dict[str, Any], urls: tuple[str, ...]) -> tuple[str, ...]:
        """The engines among `urls` that answered; the watch has seen the others dead.

        Raises:
            EngineUnavailable: one that lives did not answer.
        """
        control = EngineControl(urls, timeout_s=self._config.weight_sync_timeout_s)
        try:
            calls = control.start_post_all(path, body)
            lost = {
                url: e for url, call in zip(urls, calls, strict=True) if (e := call.exception())
            }
        finally:
            control.close()
        up = self._urls_up() if lost else urls
        deadline = time.monotonic() + DEATH_SHOWS_S
        while set(lost) & set(up) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            up = self._urls_up()
        for url, error in lost.items():
            if url in up or not isinstance(error, EngineUnavailable):
                raise error
            logger.warning("%s died before it was to change its memory", url)
        return tuple(url for url in urls if url not in lost)

    def _urls_up(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.bring_up())

    def stop(self) -> None:
        """End all servers that are ours."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self._health is not None:
            self._health.close()
        if self._router is not None:
            self._router.stop()
        stops = {name: ref for host in self._hosts.values() for name, ref in host.stop().items()}
        wait_for(stops, action="stop its server", timeout_s=STOP_TIMEOUT_S)

    def _poll(self) -> None:
        watch = self._started_watch()
        while not self._stopping.wait(POLL_S):
            try:
                watch.poll()
            except Exception as error:
                # Without this the thread would end unseen, and with it every repair.
                watch.failure = watch.failure or f"the watch over the engines failed: {error!r}"
                logger.exception("the watch over the engines failed")

    def _started_watch(self) -> EngineWatch:
        if self._watch is None:
            raise RuntimeError("the fleet has not been started")
        return self._watch

    def _make_host(self, index: int, slots: Sequence[int]) -> RayEngineHost:
        config, placement = self._config, self._placement
        kind = engine_kind(config)
        # An embedded engine is one process, however many slots.
        parts = [tuple(slots)]
        if kind != "embedded":
            parts = placement.parts(slots, config.num_gpus_per_node)
        devices = [placement.visible_devices(part) for part in parts]

        def maker(node: int) -> "Callable[[], ActorHandle[EngineActor]]":
            # The actor sits on the first of its slots; the group holds the others.
            options = {**placement.options(parts[node][0]), "max_concurrency": ENGINE_THREADS}
            make: Any = ray.remote(EngineActor)
            return lambda: make.options(**options).remote(node, len(parts))

        def begin(actors: "Sequence[ActorHandle[EngineActor]]") -> "list[ray.ObjectRef[str]]":
            ask: Any = actors[0].meeting
            # Ray hands each actor the address itself, once it is known.
            meeting = ask.remote() if len(actors) > 1 else None
            starts: list[Any] = [actor.start for actor in actors]
            return [
                start.remote(config, index, kind, self._log_dir, own, meeting)
                for start, own in zip(starts, devices, strict=True)
            ]

        return RayEngineHost(f"engine {index}", [maker(n) for n in range(len(parts))], begin)

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


def _wanted(config: Config) -> Wanted:
    """What engines that somebody else runs must be."""
    hf_config = read_whole_hf_config(config.hf_checkpoint or "")
    return Wanted(
        kind=engine_kind(config),
        model_type=hf_config.get("model_type"),
        architectures=tuple(hf_config.get("architectures") or ()),
        checkpoint=config.hf_checkpoint or "",
        gets_weights=not config.debug_rollout_only,
        run=secrets.token_hex(8),
    )


def _health_watch(config: Config) -> HealthWatch | None:
    if not config.use_fault_tolerance:
        return None
    key = run_api_key()
    return HealthWatch(
        interval_s=config.rollout_health_check_interval,
        timeout_s=config.rollout_health_check_timeout,
        first_wait_s=config.rollout_health_check_first_wait,
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )
