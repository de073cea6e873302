"""Stand-in for SGLang's kernel library on a CPU: the operator that serving a dense model needs."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.4.5"  # the release whose names these are


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Note where the new tokens of each request are in the cache.

    Args:
        req_pool_indices: [B] rows of `req_to_token`.
        req_to_token: [rows, pool_len] places in the cache; written in place.
        start_offset, end_offset: [B] positions of the new tokens of each request.
        out_cache_loc: places of all new tokens, request after request.
        pool_len: columns of `req_to_token`.
    """
    rows, starts, ends = (t.tolist() for t in (req_pool_indices, start_offset, end_offset))
    done = 0
    for row, start, end in zip(rows, starts, ends, strict=True):
        places = out_cache_loc[done : done + end - start]
        req_to_token[row, start:end] = places.to(req_to_token.dtype)
        done += end - start


def __getattr__(name: str) -> Callable[..., Any]:
    """What SGLang imports by name at start and does not call for a dense model on a CPU."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on the CPU")

    return missing
