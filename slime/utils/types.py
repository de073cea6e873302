"""Door to `slime.data.sample`."""

from slime.data.sample import PrefixCacheInfo, Sample, SpecInfo

__all__ = ["PrefixCacheInfo", "Sample", "SpecInfo"]
