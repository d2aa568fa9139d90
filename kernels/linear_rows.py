"""A chunk of raw logits to what token log-probs are made of, and to the factor of both gradients, unit dlogits.

One program a row. It reads the row twice, the second time mostly from the L2 cache, and writes dlogits once, over the
logits where both are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import ELEMENTS_PER_WARP, MAX_BLOCK_V, on_device
from napo_loss.kernels.linear_logits import head_logits, load_logits, write_dlogits


@triton.jit
def linear_rows_kernel(
    logits_ptr,  # [rows, V] float32
    bias_ptr,  # [V] or unused
    targets_ptr,  # [rows]
    out_ptr,  # [3 or 5, rows] float32: hit, peak, log-total, entropy, mean
    dlogits_ptr,  # [rows, V]; may be the logits themselves
    logits_stride,
    dlogits_stride,
    V,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row).to(tl.int64)

    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    hit = tl.zeros([BLOCK_V], tl.float32)
    if STATISTICS:
        spread = tl.zeros([BLOCK_V], tl.float32)  # Σ exp(z − peak)·(z − peak)
        logits_sum = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        x, j = load_logits(row_ptr, start, V, BLOCK_V)
        z, _slope = head_logits(x, bias_ptr, j, j < V, logit_scale, softcap, HAS_BIAS, SOFTCAP)
        z = tl.where(j < V, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        # While all logits seen are -inf there is nothing to subtract, and -inf − -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        e = tl.exp(z - base)
        shrink = tl.exp(peak - base)
        if STATISTICS:
            moved = tl.where(peak == float("-inf"), 0.0, peak - base)
            # A logit of -inf, and one whose exponential vanishes, adds nothing: 0·−inf would be NaN.
            spread = (spread + moved * total) * shrink + tl.where(e > 0, e * (z - base), 0.0)
            logits_sum += tl.where(j < V, z, 0.0)
        total = total * shrink + e
        hit += tl.where(j == target, z, 0.0)
        peak = new_peak
    # Peak and log-total stay apart: rounded into one float, the second is lost beside a large common offset of logits.
    all_total = tl.sum(total, axis=0)
    log_total = tl.log(all_total)
    # A label outside the vocabulary cannot be reported from here without a sync: it becomes a NaN.
    inside = (target >= 0) & (target < V)
    tl.store(out_ptr + row, tl.where(inside, tl.sum(hit, axis=0) - peak, float("nan")))
    tl.store(out_ptr + rows + row, peak)
    tl.store(out_ptr + 2 * rows + row, log_total)
    if STATISTICS:
        tl.store(out_ptr + 3 * rows + row, log_total - tl.sum(spread, axis=0) / all_total)
        tl.store(out_ptr + 4 * rows + row, tl.sum(logits_sum, axis=0) / V)

    if WRITE_DLOGITS:
        for start in range(0, V, BLOCK_V):
            write_dlogits(
                row_ptr, dlogits_ptr + row * dlogits_stride, bias_ptr, start, V, target, peak, log_total, 1.0,
                logit_scale, softcap, HAS_BIAS, SOFTCAP, BLOCK_V,
            )  # fmt: skip


def linear_rows(
    logits: torch.Tensor,  # [rows, V] float32
    targets: torch.Tensor,  # [rows]
    dlogits: torch.Tensor | None,  # [rows, V]
    *,
    bias: torch.Tensor | None,  # [V]
    logit_scale: float,
    softcap: float,
    statistics: bool = False,
) -> torch.Tensor:
    """Returns hit (the label's logit less the peak), peak, log-total and, asked for ``statistics``, entropy and mean of
    the logits, ``[3 or 5, rows]`` float32; writes unit ``dlogits``, which may be ``logits``, unless None.
    """
    rows, V = logits.shape
    out = torch.empty((5 if statistics else 3, rows), dtype=torch.float32, device=logits.device)
    written = logits if dlogits is None else dlogits
    block_v = min(MAX_BLOCK_V, max(16, triton.next_power_of_2(V)))
    with on_device(logits):
        linear_rows_kernel[(rows,)](
            logits,
            logits if bias is None else bias.contiguous(),
            targets,
            out,
            written,
            logits.stride(0),
            written.stride(0),
            V,
            logit_scale,
            softcap,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap != 0,
            WRITE_DLOGITS=dlogits is not None,
            STATISTICS=statistics,
            BLOCK_V=block_v,
            # Rows that are not aligned take a register pair of address per element: more lanes, fewer elements each.
            num_warps=max(1, block_v // (256 if V % 16 else ELEMENTS_PER_WARP)),
            enable_fp_fusion=True,
        )
    return out
