"""Door to `slime.data.loss_mask`."""

from slime.data.loss_mask import MultiTurnLossMaskGenerator

__all__ = ["MultiTurnLossMaskGenerator"]
