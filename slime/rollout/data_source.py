"""Door to `slime.data.data_source`."""

from slime.data.data_source import (
    DataSource,
    RolloutDataSource,
    RolloutDataSourceWithBuffer,
    pop_first,
)

__all__ = ["DataSource", "RolloutDataSource", "RolloutDataSourceWithBuffer", "pop_first"]
