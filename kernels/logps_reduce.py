"""Partial sums of exponentials to sequence log-probs: one program per sequence, always the same order of additions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import on_device
from napo_loss.kernels.logps_forward import Partials
from napo_loss.kernels.row import LOG2E

BLOCK_T = {"long": 512, "short": 32}  # positions at a time: two tiles, so that lengths do not compile kernels
TOGETHER = 8
"""Programs of a row whose sums are loaded before the first is added: to wait for each takes longer than all else."""


@triton.jit(
    do_not_specialize=[
        "labels_stride_n", "labels_stride_t", "weights_stride_n", "weights_stride_t", "T", "rows", "splits", "shift",
        "ignore_index",
    ],
    do_not_specialize_on_alignment=["labels_ptr", "weights_ptr"],
)  # fmt: skip
def logps_reduce_kernel(
    peak_ptr,  # [splits, N·T]
    total_ptr,  # [splits, N·T]
    target_ptr,  # [N·T]
    labels_ptr,  # [N, T]
    weights_ptr,  # [N, T] or unused
    normalizer_ptr,  # [2, N, T] float32: peak and log-total of each active row, 0 elsewhere
    sum_ptr,  # [N] float32
    length_ptr,  # [N] float32
    labels_stride_n,
    labels_stride_t,
    weights_stride_n,
    weights_stride_t,
    T,
    rows,
    splits,
    shift,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_T], tl.float32)
    lengths = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        label_t = (t + shift).to(tl.int64)
        label_ptr = labels_ptr + n * labels_stride_n + label_t * labels_stride_t
        label = tl.load(label_ptr, mask=label_t < T, other=ignore_index)
        active = label != ignore_index
        row = n * T + t
        shares = tl.where(active, splits, 0)
        target = tl.load(target_ptr + row, mask=active, other=0.0)

        peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        for first in range(0, splits, TOGETHER):
            for s in tl.static_range(TOGETHER):
                at = (first + s) * rows.to(tl.int64) + row
                there = first + s < shares
                part_peak = tl.load(peak_ptr + at, mask=there, other=float("-inf"))
                part_total = tl.load(total_ptr + at, mask=there, other=0.0)
                new_peak = tl.maximum(peak, part_peak)
                # While all logits seen are -inf there is nothing to subtract, and -inf − -inf would be NaN.
                base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                total = total * tl.exp2((peak - base) * LOG2E) + part_total * tl.exp2((part_peak - base) * LOG2E)
                peak = new_peak
        # Peak and log-total stay apart: in one float the second is lost beside a large common offset of the logits.
        peak = tl.where(active, peak, 0.0)
        log_total = tl.log(tl.where(active, total, 1.0))
        tl.store(normalizer_ptr + row, peak, mask=t < T)
        tl.store(normalizer_ptr + rows + row, log_total, mask=t < T)

        weight = active.to(tl.float32)
        if HAS_WEIGHTS:
            weight_ptr = weights_ptr + n * weights_stride_n + label_t * weights_stride_t
            weight = tl.load(weight_ptr, mask=active, other=0.0).to(tl.float32)
        logp = (target - peak) - log_total
        # A token of weight 0 does not count, though the policy excludes it: 0·−inf is 0.
        sums += tl.where(weight == 0, 0.0, weight * logp)
        lengths += weight
    tl.store(sum_ptr + n, tl.sum(sums, axis=0))
    tl.store(length_ptr + n, tl.sum(lengths, axis=0))


def logps_reduce(
    partials: Partials,
    labels: torch.Tensor,  # [N, T]
    token_weights: torch.Tensor | None,  # [N, T]
    shift: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ``sum [N]``, ``length [N]`` and ``normalizer [2, N, T]`` from what ``logps_forward`` left."""
    N, T = labels.shape
    normalizer = torch.empty((2, N, T), dtype=torch.float32, device=labels.device)
    sums = torch.empty(N, dtype=torch.float32, device=labels.device)
    lengths = torch.empty_like(sums)
    weights = labels if token_weights is None else token_weights
    block_t = BLOCK_T["short" if BLOCK_T["short"] >= T else "long"]
    with on_device(labels):
        logps_reduce_kernel[(N,)](
            partials.peak,
            partials.total,
            partials.target,
            labels,
            weights,
            normalizer,
            sums,
            lengths,
            *labels.stride(),
            *weights.stride(),
            T,
            N * T,
            partials.peak.shape[0],
            shift,
            ignore_index,
            HAS_WEIGHTS=token_weights is not None,
            TOGETHER=TOGETHER,
            BLOCK_T=block_t,
            num_warps=4 if block_t == BLOCK_T["long"] else 1,
            enable_fp_fusion=True,
        )
    return sums, lengths, normalizer
