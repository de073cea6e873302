"""Waits on Ray calls with a deadline, an owner and a name in the message."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from slime.errors import DeadlineExceeded, SlimeError
from slime.observability.doctor import late_report
from slime.observability.waits import waiting

PATIENCE_S = 60.0


def wait_for(
    calls: Mapping[str, "ray.ObjectRef[Any]"],
    *,
    action: str,
    timeout_s: float,
    on_tick: Callable[[], None] | None = None,
    tick_s: float = 1.0,
) -> list[Any]:
    """Results of `calls`, in order.

    The waits are noted, so that a late one is warned of. When the deadline is over, the doctor asks
    every process of the run for its stacks first.

    Args:
        calls: who does it (`train rank 0`) -> the reference of its call.
        action: what is waited for (`load the checkpoint`), for messages.
        timeout_s: deadline of all calls together, seconds.
        on_tick: called about every `tick_s` seconds while waiting; what it raises ends the wait.

    Raises:
        DeadlineExceeded: names who has not answered, and who waits for whom.
        SlimeError: an actor raised one, or died; a SlimeError raised in an actor comes out as
            itself.
    """
    start = time.monotonic()
    patience_s = PATIENCE_S if on_tick is None else min(tick_s, PATIENCE_S)
    pending = {ref: name for name, ref in calls.items()}
    with waiting(_names(pending.values()), action, deadline_s=timeout_s) as wait:
        while pending:
            left = timeout_s - (time.monotonic() - start)
            if left <= 0:
                late = f"{wait.on}: did not {action} within {timeout_s:.0f} s."
                raise DeadlineExceeded(late_report(late))
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left, patience_s))
            if not ready and on_tick is not None:
                on_tick()
            for ref in ready:
                # Look at each call as it ends: one failed rank must not hide behind the others'
                # deadline.
                _raise_failure(ref, pending.pop(ref), action)
                wait.on = _names(pending.values())
    return [_get(ref) for ref in calls.values()]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _raise_failure(ref: "ray.ObjectRef[Any]", name: str, action: str) -> None:
    try:
        _get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SlimeError):
            raise cause from None
        raise SlimeError(f"{name} failed to {action}: {error}") from None
    except RayActorError as error:
        raise SlimeError(
            f"{name} died while it was to {action}: {error}. Its log is in the run folder under logs/."
        ) from None


def _get(ref: "ray.ObjectRef[Any]") -> Any:
    try:
        return ray.get(ref, timeout=60.0)
    except GetTimeoutError as error:
        raise DeadlineExceeded(
            f"an object of the Ray store that was ready could not be fetched in 60 s: {ref}"
        ) from error
