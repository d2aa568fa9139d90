"""Logits to partial sums of exponentials: the one pass over the active rows.

Reads each active row once (``c·N·T·V`` elements) and writes two floats per program: a base and ``Σ exp(x − base)``.
Masked rows return before they touch a logit.

The base is the largest logit of the block that is read first and the label's. So the loop needs no running maximum, no
reduction across warps and no barrier. Where logits are far above it, more than 41 nats in sum, that shows at the end,
and the program goes through its share again, with its largest logit: the label's probability is below 1e-18 then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import from_boundary, logits_launch, on_device
from napo_loss.kernels.row import LARGEST_TOTAL, LOG2E, body_share, row_body, row_edges


@triton.jit
def _load(ptr, start, stride_v, BLOCK_V: tl.constexpr):
    j = (tl.multiple_of(start, BLOCK_V) + tl.arange(0, BLOCK_V)).to(tl.int64)
    return tl.load(ptr + j * stride_v).to(tl.float32)


@triton.jit
def _exp_sum(body_ptr, low, tail, last, edges, base, stride_v, BLOCK_V: tl.constexpr):
    """``Σ exp(x − base)``: subtracted before it is scaled, so that a common offset of logits loses nothing."""
    total = tl.exp2((last - base) * LOG2E)
    for start in range(low, tail, BLOCK_V):
        total += tl.exp2((_load(body_ptr, start, stride_v, BLOCK_V) - base) * LOG2E)
    return tl.sum(total, axis=0) + tl.sum(tl.exp2((edges - base) * LOG2E), axis=0)


@triton.jit
def _largest(body_ptr, low, tail, last, edges, stride_v, BLOCK_V: tl.constexpr):
    for start in range(low, tail, BLOCK_V):
        last = tl.maximum(last, _load(body_ptr, start, stride_v, BLOCK_V))
    return tl.maximum(tl.max(last, axis=0), tl.max(edges, axis=0))


@triton.jit(
    do_not_specialize=[
        "start", "stride_n", "stride_t", "labels_stride_n", "labels_stride_t", "T", "V", "rows", "chunk", "shift",
        "ignore_index",
    ],
    do_not_specialize_on_alignment=["labels_ptr"],
)  # fmt: skip
def logps_forward_kernel(
    logits_ptr,  # [N, T, V], from the boundary before
    labels_ptr,  # [N, T]
    peak_ptr,  # [splits, rows] float32: the base of the program's share of the row
    total_ptr,  # [splits, rows] float32: Σ exp(x − base) over it
    target_ptr,  # [rows] float32: the label's logit
    start,  # elements from that boundary to the first logit
    stride_n,
    stride_t,
    stride_v,
    labels_stride_n,
    labels_stride_t,
    T,
    V,
    rows,
    chunk,
    shift,
    ignore_index,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    n = row // T
    t = row % T
    label_t = t + shift
    label = tl.load(
        labels_ptr + n * labels_stride_n + label_t * labels_stride_t, mask=label_t < T, other=ignore_index
    ).to(tl.int64)
    if label == ignore_index:
        return

    offset = start + n * stride_n + t * stride_t
    row_ptr = logits_ptr + offset
    before, body = row_body(offset, V, ALIGN)
    body_ptr = logits_ptr + tl.multiple_of(offset + before, ALIGN)
    low, tail, high = body_share(split, chunk, body, ALIGN, BLOCK_V)

    v, edge = row_edges(split, before, body, V, ALIGN)
    edges = tl.load(row_ptr + v * stride_v, mask=edge, other=float("-inf")).to(tl.float32)
    j = tail + tl.arange(0, BLOCK_V)
    last_ptr = body_ptr + j.to(tl.int64) * stride_v
    last = tl.load(last_ptr, mask=j < high, other=float("-inf")).to(tl.float32)
    inside = (label >= 0) & (label < V)
    target = tl.load(row_ptr + label * stride_v, mask=inside, other=float("-inf")).to(tl.float32)

    peak = tl.maximum(tl.maximum(tl.max(last, axis=0), tl.max(edges, axis=0)), target)
    total = _exp_sum(body_ptr, low, tail, last, edges, peak, stride_v, BLOCK_V)
    if not (total < LARGEST_TOTAL):  # or NaN: -inf − -inf
        last = tl.load(last_ptr, mask=j < high, other=float("-inf")).to(tl.float32)  # again: it was not kept
        peak = _largest(body_ptr, low, tail, last, edges, stride_v, BLOCK_V)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = _exp_sum(body_ptr, low, tail, last, edges, base, stride_v, BLOCK_V)

    if split == 0:
        # A label outside the vocabulary cannot be reported from here without a sync: it becomes a NaN.
        tl.store(target_ptr + row, tl.where(inside, target, float("nan")))
    at = split.to(tl.int64) * rows + row
    tl.store(peak_ptr + at, peak)
    tl.store(total_ptr + at, total)


class Partials(NamedTuple):
    """Of the programs that share a row; only active rows are written."""

    peak: torch.Tensor  # [splits, N·T] float32: the base of the program's share, its largest logit or close to it
    total: torch.Tensor  # [splits, N·T] float32: Σ exp(x − peak) over it
    target: torch.Tensor  # [N·T] float32: the label's logit


def logps_forward(
    logits: torch.Tensor,  # [N, T, V]
    labels: torch.Tensor,  # [N, T]
    shift: int,
    ignore_index: int,
) -> Partials:
    N, T, V = logits.shape
    logits, start = from_boundary(logits)
    launch = logits_launch(N * T, V, logits.element_size(), aligned=logits.stride(2) == 1)
    peak = torch.empty((launch.splits, N * T), dtype=torch.float32, device=logits.device)
    total = torch.empty_like(peak)
    target = torch.empty(N * T, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        logps_forward_kernel[(N * T, launch.splits)](
            logits,
            labels,
            peak,
            total,
            target,
            start,
            *logits.stride(),
            *labels.stride(),
            T,
            V,
            N * T,
            launch.chunk,
            shift,
            ignore_index,
            ALIGN=launch.align,
            BLOCK_V=launch.block_v,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return Partials(peak, total, target)
