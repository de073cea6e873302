"""Attention masks for explicit positions, in the form a model's config and attention call for."""

from typing import Any

import torch
from torch import Tensor

from slime.errors import EngineError

FULL = "full_attention"
SLIDING = "sliding_attention"

Mask = Tensor | dict[str, Tensor]


class CausalMasks:
    """Makes causal masks; sliding windows included where the config has them.

    Args:
        config: a transformers text config.
        additive: float masks (0 or the dtype's minimum) instead of boolean ones: what `eager`
            attention adds to its scores. It takes a boolean mask too, and computes nonsense.
        dtype: of additive masks.

    Raises:
        EngineError: a layer type with another kind of state (linear or chunked attention).
    """

    def __init__(self, config: Any, *, additive: bool, dtype: torch.dtype) -> None:
        layer_types: set[str] = set(getattr(config, "layer_types", None) or ())
        if unknown := layer_types - {FULL, SLIDING}:
            raise EngineError(
                f"the embedded engine cannot run layers of type {', '.join(sorted(unknown))} "
                f"(model type {config.model_type}); use SGLang for this model"
            )
        window = getattr(config, "sliding_window", None)
        self.window: int | None = window if SLIDING in layer_types or not layer_types else None
        # Models with layer types choose their mask from a dict; older ones use the one they get.
        self._by_type = SLIDING in layer_types
        self._fill = torch.finfo(dtype).min if additive else None
        self._dtype = dtype

    def make(self, positions: Tensor, num_keys: int) -> Mask:
        """Masks [B, 1, Q, num_keys] for queries at `positions` [B, Q]; key j is at position j."""
        keys = torch.arange(num_keys)
        allowed = keys <= positions[:, None, :, None]
        if self.window is None:
            return self._form(allowed)
        inside = allowed & (keys > positions[:, None, :, None] - self.window)
        if not self._by_type:
            return self._form(inside)
        return {FULL: self._form(allowed), SLIDING: self._form(inside)}

    def _form(self, allowed: Tensor) -> Tensor:
        if self._fill is None:
            return allowed
        zeros = torch.zeros(allowed.shape, dtype=self._dtype)
        return zeros.masked_fill_(~allowed, self._fill)
