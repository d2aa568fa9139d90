"""How much memory the path from hidden states may use, and what is worked on at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, memory_ended
from napo_loss.logps.gemm import HALF, TILE, blocks, rounds_once

SCRATCH = {"cpu": 32 * 2**20, "gpu": 512 * 2**20}
"""Bytes of logits worked on at a time, where the budget allows: enough rows to keep the matrix products efficient."""


def default_budget(device: torch.device, *, shared: bool) -> int:
    """A quarter of a GPU's free memory (what PyTorch holds unused is free), an eighth of a CPU's.

    ``shared`` with ranks that must form the same chunks: enough for a full scratch, whatever is free here.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        found = (torch.cuda.mem_get_info(device)[0] + unused) // 4
    else:
        try:
            found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
        except (ValueError, OSError, AttributeError):  # not every system says
            found = 2**30
    return max(found, scratch_bytes(device)) if shared else found


def scratch_bytes(device: torch.device) -> int:
    return SCRATCH["cpu" if device.type == "cpu" else "gpu"]


def logit_bytes(hidden: Tensor) -> int:
    """Of one logit while it is worked on: in full precision, and its dlogits beside it in half precision."""
    beside = hidden.element_size() if hidden.dtype in HALF else 0
    return accumulation_dtype(hidden).itemsize + beside


def rows_at_a_time(hidden: Tensor, width: int, scratch: int) -> int:
    """Rows of ``width`` logits that fit the scratch memory."""
    return scratch // (width * logit_bytes(hidden))


def columns_at_a_time(
    h: Tensor,  # [A, D]
    V: int,
    scratch: int,
    *,
    kept: bool,
) -> int:
    """Columns of the vocabulary: what is as large as they are wide must fit the scratch memory."""
    A, D = h.shape
    if not kept:
        most = max(64, scratch // max(1, A * logit_bytes(h)))
    elif h.dtype in HALF and not rounds_once(h.device.type):
        most = scratch // (4 * D)  # float32 results before they are rounded
    else:
        return V
    return most // TILE * TILE or most


def in_parts(work: Callable[[slice], None], parts: list[slice], *, alone: bool) -> None:
    """``work`` on each part, which it writes whole. Where memory ends, that part and what follows are halved, once.

    Not where ranks exchange something for each part: unless it is ``alone``, the others would wait for another number
    of parts.
    """
    todo, halved = list(parts), False
    while todo:
        try:
            work(todo[0])
        except (RuntimeError, MemoryError) as error:
            if not memory_ended(error) or halved or not alone or todo[0].stop - todo[0].start < 2:
                raise
        else:
            todo.pop(0)
            continue
        # Here, and not in the handler, which keeps what `work` had allocated.
        halved = True
        width = todo[0].stop - todo[0].start
        warnings.warn(
            f"out of memory with {width} rows or columns of logits at a time: going on with half as many. A smaller "
            "logits_budget leaves more for the rest of the model",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        todo = [half for part in todo for half in _halves(part)]


def _halves(part: slice) -> list[slice]:
    size = part.stop - part.start
    return [slice(part.start + x.start, part.start + x.stop) for x in blocks(size, -(-size // 2))]
