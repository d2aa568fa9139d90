"""Matrix products with float32 results, whatever the dtype of the factors.

A half-precision result would round every logit: about 0.5 nat per sequence of 400 tokens. The products themselves are
PyTorch's.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
UPCAST_BYTES = 16 * 2**20
"""Float32 copies of half-precision factors held at a time, where no product of the two keeps float32."""


def mm_float32(
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
) -> Tensor:
    """``a @ b [m, n]`` in float32 for half-precision factors, else in their own dtype."""
    if a.dtype not in HALF:
        return torch.mm(a, b)
    if _has_out_dtype(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    (m, k), n = a.shape, b.shape[1]
    if k < n:
        out, a = a.new_empty((m, n), dtype=torch.float32), a.float()
        for block in blocks(n, UPCAST_BYTES // (4 * max(1, k))):
            torch.mm(a, b[:, block].float(), out=out[:, block])
        return out
    out = a.new_zeros((m, n), dtype=torch.float32)
    for block in blocks(k, UPCAST_BYTES // (4 * (m + n))):
        out.addmm_(a[:, block].float(), b[block].float())
    return out


def mm_into(
    out: Tensor,  # [m, n]
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n]
) -> None:
    """``out = a @ b``, rounded once to the dtype of ``out``."""
    if a.dtype == out.dtype and a.dtype not in HALF:
        torch.mm(a, b, out=out)
    else:
        out.copy_(mm_float32(a, b))


def blocks(size: int, width: int) -> list[slice]:
    """Slices of at most ``width`` (at least 1) that cover ``range(size)``."""
    width = max(1, width)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def padded(like: Tensor, rows: int | torch.SymInt, V: int) -> Tensor:
    """``[rows, V]`` with rows on aligned addresses, which matrix products and wide stores ask for."""
    return like.new_empty((rows, -(-V // 16) * 16))[:, :V]


@lru_cache
def _has_out_dtype(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend multiplies half-precision matrices into float32 ones; asked once, by trying."""
    x = torch.zeros(16, 16, device=device_type, dtype=dtype)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
