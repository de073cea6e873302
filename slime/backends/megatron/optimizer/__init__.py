"""Megatron's distributed optimizer, and which memory its state and the weights are in."""
