"""Elementwise chains as one Triton kernel each, for CUDA: norm, heads (norm and rotation), SwiGLU.

Each reads its inputs once and writes its outputs once, computes in fp32 and takes any number of
rows without being compiled again. Gradients of weights are added up in a fixed order, so the same
input gives the same bits.
"""
