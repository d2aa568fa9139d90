"""Matrix products with float32 sums, whatever the dtype of the factors, and operands on aligned addresses.

A half-precision result would round every logit: about 0.5 nat per sequence of 400 tokens. The products themselves are
PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, memory_ended

HALF = (torch.bfloat16, torch.float16)
UPCAST_BYTES = 16 * 2**20
"""Float32 copies of half-precision factors held at a time, where no product of the two keeps float32."""
TILE = 128
"""Rows and columns of a tile of a product: what is cut into pieces is cut between tiles."""
CPU_TILE = 16
"""Rows of one on a CPU, which wins more by pieces of the same size than by whole tiles."""


def mm_float32(
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
    out: Tensor | None = None,  # [m, n]
) -> Tensor:
    """``a @ b [m, n]`` in float32 for half-precision factors, else in their own dtype."""
    (m, k), n = a.shape, b.shape[1]
    full = accumulation_dtype(a)
    if out is None:
        out = a.new_empty((m, n), dtype=full)
    if a.dtype == full:
        return torch.mm(a, b, out=out)
    if _has_out_dtype(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=full, out=out)
    if k < n:
        a = a.float()
        for block in blocks(n, UPCAST_BYTES // (4 * max(1, k))):
            torch.mm(a, b[:, block].float(), out=out[:, block])
        return out
    out.zero_()
    for block in blocks(k, UPCAST_BYTES // (4 * (m + n))):
        out.addmm_(a[:, block].float(), b[block].float())
    return out


def mm_into(
    out: Tensor,  # [m, n]
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
) -> None:
    """``out = a @ b``, summed in float32 and rounded once to the dtype of ``out``."""
    if out.dtype == accumulation_dtype(a):
        mm_float32(a, b, out)
    elif rounds_once(a.device.type) and a.dtype == out.dtype:
        with _whole_sums(out.dtype):
            torch.mm(a, b, out=out)
    else:
        out.copy_(mm_float32(a, b))


def rounds_once(device_type: str) -> bool:
    """Whether half-precision products of this backend are sums in float32, rounded at the end: cuBLAS's and rocBLAS's
    are. On a CPU it depends on the processor.
    """
    return device_type == "cuda"


@contextmanager
def _whole_sums(dtype: torch.dtype) -> Iterator[None]:
    """Keeps cuBLAS, where it splits a sum over programs, from rounding the parts before it adds them up."""
    flags = torch.backends.cuda.matmul
    name = f"allow_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    before, split_k = getattr(flags, name), getattr(flags, f"{name}_split_k", None)  # older torch has not the latter
    try:
        setattr(flags, name, False if split_k is None else (False, split_k))
        yield
    finally:
        setattr(flags, name, before if split_k is None else (before, split_k))


def blocks(size: int, width: int) -> list[slice]:
    """Slices of at most ``width`` (at least 1) that cover ``range(size)``."""
    width = max(1, width)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def balanced(size: int, most: int, device_type: str) -> list[slice]:
    """As :func:`blocks`, but of about the same width, without a small rest; whole tiles where it is not all one."""
    if size <= most:
        return blocks(size, most)
    tile = TILE if device_type == "cuda" else CPU_TILE
    tile = tile if most >= tile else 1
    most = max(1, most // tile * tile)
    width = -(-size // max(1, -(-size // most)))
    return blocks(size, -(-width // tile) * tile)


def padded(like: Tensor, rows: int | torch.SymInt, V: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[rows, V]`` with rows on aligned addresses, which matrix products and wide stores ask for."""
    return like.new_empty((rows, -(-V // 16) * 16), dtype=dtype)[:, :V]


@lru_cache
def _has_out_dtype(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend multiplies half-precision matrices into float32 ones; asked once, by trying."""
    x = torch.zeros(16, 16, device=device_type, dtype=dtype)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError, MemoryError) as error:
        if memory_ended(error):
            raise  # says nothing about the backend, and nothing is kept
        return False
    return True
