"""RequestScope: what the requests share that one call of a user's function sends to the engines.

It travels as a context variable, so that a function which only knows `post(url, payload)`, and the tasks
it starts, are covered without a change.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from slime.engines.request_seeds import RequestSeeds
from slime.engines.usage import Usage


@dataclass(frozen=True)
class RequestScope:
    """One execution.

    Attributes:
        seeds: of its requests; None: engines choose.
        usage: what it asked for so far.
    """

    seeds: RequestSeeds | None = None
    usage: Usage = field(default_factory=Usage)


_scope: ContextVar[RequestScope | None] = ContextVar("request scope", default=None)


def current_scope() -> RequestScope | None:
    """The scope of the running task; None outside of users' functions."""
    return _scope.get()


@contextmanager
def request_scope(seed: int | None) -> Generator[RequestScope]:
    """A new scope for the block and the tasks it starts.

    Args:
        seed: of the sample; None: engines choose theirs.
    """
    scope = RequestScope(None if seed is None else RequestSeeds(seed))
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)
