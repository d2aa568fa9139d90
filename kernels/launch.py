"""How the logits kernels are launched: a pure function of shapes and dtypes, so no tuning happens at run time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton

# Programs that keep every multiprocessor of a large GPU busy even when 19 rows of 20 are masked and return at
# once: 132 multiprocessors x 8 resident programs / 0.05 ~ 2e4.
PROGRAMS = 32768
MAX_BLOCK_V = 4096
ELEMENTS_PER_WARP = 512  # 16 per lane of 32: two 16-byte loads of bf16 in flight


class LogitsLaunch(NamedTuple):
    align: int  # elements to the next 16-byte boundary at most; 1: rows cannot be aligned
    block_v: int
    num_warps: int
    splits: int  # programs that share a row
    chunk: int  # elements of an aligned row per program, a multiple of block_v


def logits_launch(rows: int, V: int, itemsize: int, *, aligned: bool) -> LogitsLaunch:
    """Tiles for ``rows`` rows of ``V`` logits of ``itemsize`` bytes each.

    ``aligned`` says that a row is contiguous: then a program starts at the 16-byte boundary before the row, so
    that loads are 16 bytes wide whatever V is (50257 is odd: without this, two bytes at a time).
    """
    align = 16 // itemsize if aligned else 1
    width = V + align - 1  # the row may start anywhere inside its first 16 bytes
    block_v = min(MAX_BLOCK_V, max(16, triton.next_power_of_2(width)))
    blocks = triton.cdiv(width, block_v)
    # Two blocks a program at least: starting one costs about as much as a block of work.
    splits = max(1, min(triton.cdiv(blocks, 2), PROGRAMS // max(rows, 1)))
    chunk = triton.cdiv(blocks, splits) * block_v
    return LogitsLaunch(
        align=align,
        block_v=block_v,
        num_warps=max(1, min(8, block_v // ELEMENTS_PER_WARP)),
        splits=triton.cdiv(blocks * block_v, chunk),
        chunk=chunk,
    )


def on_device(x: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
