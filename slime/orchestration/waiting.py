"""Waits on Ray calls with a deadline, an owner and a name in the message."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from slime.errors import DeadlineExceeded, SlimeError

logger = logging.getLogger(__name__)

WARN_AFTER_S = 60.0


def wait_for(
    calls: Mapping[str, "ray.ObjectRef[Any]"], *, action: str, timeout_s: float
) -> list[Any]:
    """Results of `calls`, in order.

    Args:
        calls: who does it (`train rank 0`) -> the reference of its call.
        action: what is waited for (`load the checkpoint`), for messages.
        timeout_s: deadline of all calls together, seconds.

    Raises:
        DeadlineExceeded: names who has not answered.
        SlimeError: an actor raised one, or died; a SlimeError raised in an actor comes out as
            itself.
    """
    start = time.monotonic()
    pending = {ref: name for name, ref in calls.items()}
    while pending:
        left = timeout_s - (time.monotonic() - start)
        if left <= 0:
            raise DeadlineExceeded(
                f"{', '.join(sorted(pending.values()))}: did not {action} within {timeout_s:.0f} s. "
                "Their logs are in the run folder under logs/."
            )
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left, WARN_AFTER_S))
        if not ready:
            waited = time.monotonic() - start
            logger.warning(
                "waiting %.0f s for %s to %s", waited, ", ".join(pending.values()), action
            )
        for ref in ready:
            # Look at each call as it ends: one failed rank must not hide behind the others'
            # deadline.
            _raise_failure(ref, pending.pop(ref), action)
    return [_get(ref) for ref in calls.values()]


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
