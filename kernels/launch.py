"""How the logits kernels are launched: a pure function of shapes and dtypes, so no tuning happens at run time."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

# Few enough that those of masked rows, which return at once, cost less than the rest even when 19 rows of 20 are
# masked; many enough that the rest keep the multiprocessors of a large GPU busy.
PROGRAMS = 16384
BLOCK_BYTES = 4096  # of a row, at a time
NUM_WARPS = 4  # 32 bytes a lane and block: two 16-byte loads in flight; programs stay small for few active rows


class LogitsLaunch(NamedTuple):
    align: int  # elements of 16 bytes; 1: rows cannot be aligned
    block_v: int
    num_warps: int
    splits: int  # programs that share a row
    chunk: int  # elements of a row per program, a multiple of block_v


@lru_cache(maxsize=1024)
def logits_launch(rows: int, V: int, itemsize: int, *, aligned: bool) -> LogitsLaunch:
    """Tiles for ``rows`` rows of ``V`` logits of ``itemsize`` bytes each.

    ``aligned`` says that a row is contiguous: then a program starts at the first 16-byte boundary in the row, so that
    loads are 16 bytes wide whatever V is (50257 is odd: without this, two bytes at a time).
    """
    block_v = min(BLOCK_BYTES // itemsize, max(16, triton.next_power_of_2(V)))
    blocks = triton.cdiv(V, block_v)
    # Two blocks a program at least: starting one costs about as much as a block of work.
    splits = max(1, min(triton.cdiv(blocks, 2), PROGRAMS // max(rows, 1)))
    chunk = triton.cdiv(blocks, splits) * block_v
    return LogitsLaunch(
        align=16 // itemsize if aligned else 1,
        block_v=block_v,
        num_warps=max(1, NUM_WARPS * block_v * itemsize // BLOCK_BYTES),
        splits=triton.cdiv(V, chunk),
        chunk=chunk,
    )


def from_boundary(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``x`` from the 16-byte boundary before its first element, and by how many elements it starts early.

    Triton compiles wide accesses only for pointers at such a boundary. Nothing before ``x`` is touched.
    """
    early = x.data_ptr() % 16 // x.element_size()
    if early == 0 or early > x.storage_offset():  # the latter: memory of somebody else, which starts off a boundary
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - early), early


HERE = nullcontext()


def on_device(x: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return HERE if not x.is_cuda or x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)
