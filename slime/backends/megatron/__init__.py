"""Megatron backend: stock Megatron-Core on NCCL and on gloo, without TransformerEngine and Apex.

Importing this package imports Megatron (seconds). On a machine without CUDA its modules are given
CPU answers first.
"""

from slime.backends.megatron.process.stock import load_megatron

load_megatron()
