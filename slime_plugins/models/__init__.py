"""Layers of architectures that Megatron-Core and slime's own layers do not make as they are."""

import slime.backends.megatron  # noqa: F401  before Megatron: without CUDA it needs answers first
