"""Door to `slime.rollout.loop`."""

from slime.rollout.loop import run

__all__ = ["run"]
