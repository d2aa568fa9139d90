"""Gradient of the sequence log-probs: ``dlogits = w·(onehot − softmax)``, and zeros on masked rows.

Reads the active rows once and writes every row once: ``(c + 1)·N·T·V`` elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import logits_launch, on_device


@triton.jit
def logps_backward_kernel(
    grad_sum_ptr,  # [N] dLoss/dsum
    logits_ptr,  # [N, T, V]
    labels_ptr,  # [N, T]
    weights_ptr,  # [N, T] or unused
    normalizer_ptr,  # [2, N, T], contiguous: peak and log-total
    dlogits_ptr,  # [N, T, V]; may be the logits themselves
    grad_sum_stride,
    stride_n,
    stride_t,
    stride_v,
    labels_stride_n,
    labels_stride_t,
    weights_stride_n,
    weights_stride_t,
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

    # ALIGN > 1 only where logits and dlogits have the same strides, so that one `head` serves both.
    dlogits_offset = n * dlogits_stride_n + t * dlogits_stride_t
    head = (dlogits_offset % ALIGN).to(tl.int32)
    end = head + V
    dlogits_row_ptr = dlogits_ptr + tl.multiple_of(dlogits_offset - head, ALIGN)
    row_ptr = logits_ptr + tl.multiple_of(n * stride_n + t * stride_t - head, ALIGN)
    low = split * chunk
    high = tl.minimum(low + chunk, end)
    dtype = dlogits_ptr.dtype.element_ty

    if label == ignore_index:
        zeros = tl.zeros([BLOCK_V], dtype)
        for start in range(low, high, BLOCK_V):
            j = tl.multiple_of(start, BLOCK_V) + tl.arange(0, BLOCK_V)
            ptr = dlogits_row_ptr + j.to(tl.int64) * dlogits_stride_v
            if (start >= head) & (start + BLOCK_V <= end):
                tl.store(ptr, zeros)
            else:
                tl.store(ptr, zeros, mask=(j >= head) & (j < end))
        return

    w = tl.load(grad_sum_ptr + n * grad_sum_stride).to(tl.float32)
    if HAS_WEIGHTS:
        w *= tl.load(weights_ptr + n * weights_stride_n + label_t * weights_stride_t).to(tl.float32)
    peak = tl.load(normalizer_ptr + row)
    log_total = tl.load(normalizer_ptr + tl.num_programs(0) + row)
    for start in range(low, high, BLOCK_V):
        j = tl.multiple_of(start, BLOCK_V) + tl.arange(0, BLOCK_V)
        ptr = row_ptr + j.to(tl.int64) * stride_v
        dlogits_at = dlogits_row_ptr + j.to(tl.int64) * dlogits_stride_v
        inner = (start >= head) & (start + BLOCK_V <= end)
        if inner:
            x = tl.load(ptr).to(tl.float32)
        else:
            x = tl.load(ptr, mask=(j >= head) & (j < end), other=float("-inf")).to(tl.float32)
        onehot = (j - head == label).to(tl.float32)
        dlogits = (w * (onehot - tl.exp((x - peak) - log_total))).to(dtype)
        if inner:
            tl.store(dlogits_at, dlogits)
        else:
            tl.store(dlogits_at, dlogits, mask=(j >= head) & (j < end))


def logps_backward(
    grad_sum: torch.Tensor,  # [N]
    logits: torch.Tensor,  # [N, T, V]
    labels: torch.Tensor,  # [N, T]
    token_weights: torch.Tensor | None,  # [N, T]
    normalizer: torch.Tensor,  # [2, N, T], contiguous
    dlogits: torch.Tensor,  # [N, T, V]
    shift: int,
    ignore_index: int,
) -> None:
    """Writes ``dlogits`` (every element), which may be ``logits`` itself."""
    N, T, V = logits.shape
    aligned = logits.stride(2) == 1 and logits.stride() == dlogits.stride()
    launch = logits_launch(N * T, V, logits.element_size(), aligned=aligned)
    weights = labels if token_weights is None else token_weights
    with on_device(logits):
        logps_backward_kernel[(N * T, launch.splits)](
            grad_sum,
            logits,
            labels,
            weights,
            normalizer,
            dlogits,
            *grad_sum.stride(),
            *logits.stride(),
            *labels.stride(),
            *weights.stride(),
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
