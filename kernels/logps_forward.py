"""Logits to partial logsumexps: the one pass over the active rows.

Reads each active row once (``c·N·T·V`` elements) and writes two floats per program: the running maximum and the
sum of exponentials below it. Masked rows return before they touch a logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import logits_launch, on_device


@triton.jit
def logps_forward_kernel(
    logits_ptr,  # [N, T, V]
    labels_ptr,  # [N, T]
    peak_ptr,  # [splits, rows] float32: max over the program's share of the row
    total_ptr,  # [splits, rows] float32: Σ exp(x − peak) over it
    target_ptr,  # [rows] float32: the label's logit
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

    # Work in an aligned row that starts `head` elements early: entry v of the vocabulary is its element head + v.
    offset = n * stride_n + t * stride_t
    head = (offset % ALIGN).to(tl.int32)
    end = head + V
    row_ptr = logits_ptr + tl.multiple_of(offset - head, ALIGN)

    if split == 0:
        # A label outside the vocabulary cannot be reported from here without a sync: it becomes a NaN.
        inside = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + offset + label * stride_v, mask=inside, other=0.0).to(tl.float32)
        tl.store(target_ptr + row, tl.where(inside, target, float("nan")))

    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, end), BLOCK_V):
        j = tl.multiple_of(start, BLOCK_V) + tl.arange(0, BLOCK_V)
        ptr = row_ptr + j.to(tl.int64) * stride_v
        if (start >= head) & (start + BLOCK_V <= end):  # a mask would narrow the loads
            x = tl.load(ptr).to(tl.float32)
        else:
            x = tl.load(ptr, mask=(j >= head) & (j < end), other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        # While all logits seen are -inf there is nothing to subtract, and -inf − -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        peak = new_peak

    at = split.to(tl.int64) * rows + row
    tl.store(peak_ptr + at, peak)
    tl.store(total_ptr + at, tl.sum(total, axis=0))


class Partials(NamedTuple):
    """Of the programs that share a row; only active rows are written."""

    peak: torch.Tensor  # [splits, N·T] float32: max over the program's share
    total: torch.Tensor  # [splits, N·T] float32: Σ exp(x − peak) over it
    target: torch.Tensor  # [N·T] float32: the label's logit


def logps_forward(
    logits: torch.Tensor,  # [N, T, V]
    labels: torch.Tensor,  # [N, T]
    shift: int,
    ignore_index: int,
) -> Partials:
    N, T, V = logits.shape
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
