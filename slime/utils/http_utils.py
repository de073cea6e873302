"""Door to `slime.engines.client`."""

from slime.engines.client import get, post

__all__ = ["get", "post"]
