"""What watches over an engine asks of it: start, is it up, is it dead; answered through its Ray actor."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from slime.errors import EngineUnavailable, SlimeError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from slime.orchestration.engine_actor import EngineActor


# Of an answer that is there already.
GET_TIMEOUT_S = 60.0


class EngineHost(Protocol):
    """One engine's place in the cluster, whatever server process it has at the moment."""

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

    Args:
        make_actor: a new actor in the engine's slot.
        begin: calls its `start` with the engine's arguments.
    """

    def __init__(
        self,
        make_actor: "Callable[[], ActorHandle[EngineActor]]",
        begin: "Callable[[ActorHandle[EngineActor]], ray.ObjectRef[str]]",
    ) -> None:
        self._make_actor = make_actor
        self._begin = begin
        self.actor = make_actor()
        self._is_lost = False
        self._probe: ray.ObjectRef[str | None] | None = None
        self.starting = begin(self.actor)

    def begin_start(self) -> None:
        """As `EngineHost`."""
        if self._is_lost:
            self.actor = self._make_actor()
            self._is_lost = False
        self._probe = None
        self.starting = self._begin(self.actor)

    def started(self) -> str | None:
        """As `EngineHost`."""
        ready, _ = ray.wait([self.starting], timeout=0)
        return self._get(self.starting) if ready else None

    def death(self, wait_s: float) -> str | None:
        """As `EngineHost`."""
        if self._probe is None:
            ask: Any = self.actor.death
            self._probe = ask.remote()
        assert self._probe is not None
        probe = self._probe
        ready, _ = ray.wait([probe], timeout=wait_s)
        if not ready:
            return None
        self._probe = None
        try:
            return self._get(probe)
        except SlimeError as error:
            return str(error)

    def _get(self, ref: "ray.ObjectRef[Any]") -> Any:
        try:
            return ray.get(ref, timeout=GET_TIMEOUT_S)
        except RayTaskError as error:
            cause = error.cause
            raise (
                cause if isinstance(cause, SlimeError) else EngineUnavailable(str(error))
            ) from None
        except RayActorError as error:
            self._is_lost = True
            reason = str(error).splitlines()[0]
            raise EngineUnavailable(f"the Ray actor that holds it died ({reason})") from None
