"""Gradient of the sequence log-probs: ``dlogits = w·(onehot − softmax)``, and zeros on masked rows.

Reads the active rows once and writes every row once: ``(c + 1)·N·T·V`` elements. The loop writes ``−w·softmax``; the
label's entry is written after it, from a logit that was read before it, since dlogits may replace the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import from_boundary, logits_launch, on_device
from napo_loss.kernels.row import LOG2E, body_share, row_body, row_edges


@triton.jit
def _softmax(x, peak, log2_total):
    """Subtracted before it is scaled, so that a common offset of logits loses nothing."""
    return tl.exp2((x.to(tl.float32) - peak) * LOG2E - log2_total)


@triton.jit(
    do_not_specialize=[
        "grad_sum_stride", "start", "stride_n", "stride_t", "labels_stride_n", "labels_stride_t", "weights_stride_n",
        "weights_stride_t", "dlogits_start", "dlogits_stride_n", "dlogits_stride_t", "T", "V", "chunk", "shift",
        "ignore_index",
    ],
    do_not_specialize_on_alignment=["grad_sum_ptr", "labels_ptr", "weights_ptr"],
)  # fmt: skip
def logps_backward_kernel(
    grad_sum_ptr,  # [N] dLoss/dsum
    logits_ptr,  # [N, T, V], from the boundary before
    labels_ptr,  # [N, T]
    weights_ptr,  # [N, T] or unused
    normalizer_ptr,  # [2, N, T], contiguous: peak and log-total
    dlogits_ptr,  # [N, T, V], from the boundary before; may be the logits themselves
    grad_sum_stride,
    start,  # elements from that boundary to the first logit
    stride_n,
    stride_t,
    stride_v,
    labels_stride_n,
    labels_stride_t,
    weights_stride_n,
    weights_stride_t,
    dlogits_start,
    dlogits_stride_n,
    dlogits_stride_t,
    dlogits_stride_v,
    T,
    V,
    chunk,
    shift,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
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

    # ALIGN > 1 only where rows of both start equally far from a boundary, so that one body serves both.
    offset = start + n * stride_n + t * stride_t
    dlogits_offset = dlogits_start + n * dlogits_stride_n + t * dlogits_stride_t
    before, body = row_body(dlogits_offset, V, ALIGN)
    row_ptr = logits_ptr + offset
    dlogits_row_ptr = dlogits_ptr + dlogits_offset
    body_ptr = logits_ptr + tl.multiple_of(offset + before, ALIGN)
    dlogits_body_ptr = dlogits_ptr + tl.multiple_of(dlogits_offset + before, ALIGN)
    low, tail, high = body_share(split, chunk, body, ALIGN, BLOCK_V)
    v, edge = row_edges(split, before, body, V, ALIGN)
    k = tl.arange(0, BLOCK_V)
    last = (tail + k).to(tl.int64)
    dtype = dlogits_ptr.dtype.element_ty

    if label == ignore_index:
        zeros = tl.zeros([BLOCK_V], dtype)
        tl.store(dlogits_row_ptr + v * dlogits_stride_v, tl.zeros([2 * ALIGN], dtype), mask=edge)
        for first in range(low, tail, BLOCK_V):
            j = (tl.multiple_of(first, BLOCK_V) + k).to(tl.int64)
            tl.store(dlogits_body_ptr + j * dlogits_stride_v, zeros)
        tl.store(dlogits_body_ptr + last * dlogits_stride_v, zeros, mask=last < high)
        return

    w = tl.load(grad_sum_ptr + n * grad_sum_stride).to(tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + n * weights_stride_n + label_t * weights_stride_t).to(tl.float32)
        w = tl.where(weight == 0, 0.0, w * weight)  # does not count, whatever the loss makes of the sequence
    peak = tl.load(normalizer_ptr + row)
    log2_total = tl.load(normalizer_ptr + tl.num_programs(0) + row) * LOG2E
    at = label - before
    inside = (label >= 0) & (label < V)
    # This program's, if the label is in its share of the body, or in the edges.
    at_edge = (at < 0) | (at >= body)
    mine = inside & (((at >= low) & (at < high)) | (at_edge & (split == 0)))
    target = tl.load(row_ptr + label * stride_v, mask=mine, other=0.0)
    tl.debug_barrier()  # read by all, before anyone writes

    edges = tl.load(row_ptr + v * stride_v, mask=edge, other=0.0)
    tl.store(dlogits_row_ptr + v * dlogits_stride_v, (-w * _softmax(edges, peak, log2_total)).to(dtype), mask=edge)
    for first in range(low, tail, BLOCK_V):
        j = (tl.multiple_of(first, BLOCK_V) + k).to(tl.int64)
        x = tl.load(body_ptr + j * stride_v)
        tl.store(dlogits_body_ptr + j * dlogits_stride_v, (-w * _softmax(x, peak, log2_total)).to(dtype))
    x = tl.load(body_ptr + last * stride_v, mask=last < high, other=0.0)
    tl.store(
        dlogits_body_ptr + last * dlogits_stride_v, (-w * _softmax(x, peak, log2_total)).to(dtype), mask=last < high
    )

    tl.debug_barrier()  # written by all, before the label's entry is written again
    dlogits = (w * (1.0 - _softmax(target, peak, log2_total))).to(dtype)
    tl.store(dlogits_row_ptr + label * dlogits_stride_v, dlogits, mask=mine)


def logps_backward(
    grad_sum: torch.Tensor,  # [N]
    logits: torch.Tensor,  # [N, T, V]
    labels: torch.Tensor,  # [N, T]
    token_weights: torch.Tensor | None,  # [N, T]
    normalizer: torch.Tensor,  # [2, N, T], contiguous: peak and log-total of each row
    dlogits: torch.Tensor,  # [N, T, V]
    shift: int,
    ignore_index: int,
) -> None:
    """Writes ``dlogits`` (every element), which may be ``logits`` itself."""
    N, T, V = logits.shape
    weights = labels if token_weights is None else token_weights
    (logits, start), (dlogits, dlogits_start) = from_boundary(logits), from_boundary(dlogits)
    aligned = _rows_start_alike((start, *logits.stride()), (dlogits_start, *dlogits.stride()), 16 // logits.itemsize)
    launch = logits_launch(N * T, V, logits.itemsize, aligned=aligned)
    with on_device(logits):
        logps_backward_kernel[(N * T, launch.splits)](
            grad_sum,
            logits,
            labels,
            weights,
            normalizer,
            dlogits,
            *grad_sum.stride(),
            start,
            *logits.stride(),
            *labels.stride(),
            *weights.stride(),
            dlogits_start,
            *dlogits.stride(),
            T,
            V,
            launch.chunk,
            shift,
            ignore_index,
            HAS_WEIGHTS=token_weights is not None,
            ALIGN=launch.align,
            BLOCK_V=launch.block_v,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )


def _rows_start_alike(a: tuple[int, ...], b: tuple[int, ...], align: int) -> bool:
    """Whether all rows of both are contiguous and start equally far from a boundary: start and strides of each."""
    return a[3] == b[3] == 1 and all((x - y) % align == 0 for x, y in zip(a[:3], b[:3], strict=True))
