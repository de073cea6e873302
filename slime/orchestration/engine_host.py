"""What watches over an engine asks of it: start, is it up, is it dead; answered through its Ray actor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from slime.errors import EngineUnavailable, SlimeError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from slime.orchestration.engine_actor import EngineActor


# Of an answer that is there already.
GET_TIMEOUT_S = 60.0


class EngineHost(Protocol):
    """One engine's place in the cluster, whatever server process it has at the moment."""

    @property
    def is_ours(self) -> bool:
        """Whether its server is ours to start; else a start waits until somebody has done so."""
        ...

    def begin_start(self) -> None:
        """Start the server, again if there was one; `started` tells when it is up."""
        ...

    def started(self) -> str | None:
        """The server's address once it answers, None before.

        Raises:
            SlimeError: it did not come up.
        """
        ...

    def death(self, wait_s: float) -> str | None:
        """Why the server is dead; None when it is alive, or not known after `wait_s` seconds."""
        ...


class RayEngineHost:
    """An `EngineHost` whose server belongs to a Ray actor; a dead actor is replaced.

    An engine on several nodes has an actor and a server process on each. They live and die together:
    without one of them the others are of no use.

    Args:
        name: of the engine, for messages.
        make_actors: makes the actor of each node in turn, in its slot.
        begin: calls `start` of all of them with the engine's arguments.
    """

    def __init__(
        self,
        name: str,
        make_actors: "Sequence[Callable[[], ActorHandle[EngineActor]]]",
        begin: "Callable[[Sequence[ActorHandle[EngineActor]]], list[ObjectRef[str]]]",
    ) -> None:
        self._name = name
        self._make_actors = tuple(make_actors)
        self._begin = begin
        self._actors = [make() for make in self._make_actors]
        self._lost: set[int] = set()
        self._probes: dict[int, ObjectRef[str | None]] = {}
        self._starting = begin(self._actors)

    @property
    def is_ours(self) -> bool:
        """As `EngineHost`."""
        return True

    @property
    def starting(self) -> "dict[str, ObjectRef[str]]":
        """The start under way of each server; that of the first gives the engine's address."""
        return {self._part_name(node): ref for node, ref in enumerate(self._starting)}

    def first_url(self, _timeout_s: float) -> str:
        """The engine's address, once all of `starting` are through."""
        url = self.started()
        assert url is not None
        return url

    def stop(self) -> "dict[str, ObjectRef[None]]":
        """Begin to end all servers."""
        stops: list[Any] = [actor.stop for actor in self._actors]
        return {self._part_name(node): stop.remote() for node, stop in enumerate(stops)}

    def begin_start(self) -> None:
        """As `EngineHost`."""
        for node in self._lost:
            self._actors[node] = self._make_actors[node]()
        self._lost.clear()
        self._probes.clear()
        self._starting = self._begin(self._actors)

    def started(self) -> str | None:
        """As `EngineHost`."""
        ready, _ = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        # One that failed must not hide behind others, which may wait for it until their deadline.
        urls = [self._get(node, ref) for node, ref in enumerate(self._starting) if ref in ready]
        return urls[0] if len(urls) == len(self._starting) else None

    def death(self, wait_s: float) -> str | None:
        """As `EngineHost`."""
        for node, actor in enumerate(self._actors):
            if node not in self._probes:
                ask: Any = actor.death
                self._probes[node] = ask.remote()
        probes = list(self._probes.items())
        refs = [ref for _, ref in probes]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=wait_s)
        for node, probe in probes:
            if probe not in ready:
                continue
            del self._probes[node]
            try:
                reason = self._get(node, probe)
            except SlimeError as error:
                reason = str(error)
            if reason is not None:
                return reason if len(probes) == 1 else f"{self._part_name(node)}: {reason}"
        return None

    def _part_name(self, node: int) -> str:
        count = len(self._actors)
        return self._name if count == 1 else f"{self._name}, node {node} of {count}"

    def _get(self, node: int, ref: "ObjectRef[Any]") -> Any:
        try:
            return ray.get(ref, timeout=GET_TIMEOUT_S)
        except RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, SlimeError) else EngineUnavailable(str(error))
            ) from None
        except RayActorError as error:
            self._lost.add(node)
            reason = str(error).splitlines()[0]
            raise EngineUnavailable(f"the Ray actor that holds it died ({reason})") from None
