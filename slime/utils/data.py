"""Door to `slime.data.dataset`."""

from slime.data.dataset import Dataset, read_rows

__all__ = ["Dataset", "read_rows"]
