"""A chunk of raw logits to what token log-probs are made of, and to the factor of both gradients, unit dlogits.

One program a row, which it reads once where dlogits are bfloat16: these are written while the row is read, before its
sum is known, so they lack a factor of the row, ``scale = 1/Σ exp(z − base)``. Who uses them multiplies by it what is a
number per row anyway, the weight from the loss. A factor costs no precision in a dtype with the exponents of float32.
Float16 has not, and float32 dlogits replace the logits: there the row is read again, and scale is 1.

The base is the largest logit of the row's last block and the label's; see ``logps_forward``, why and what if not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import NUM_WARPS, on_device
from napo_loss.kernels.linear_logits import capped, load_scaled, powers, write_dlogits, write_label
from napo_loss.kernels.row import LARGEST_TOTAL

BLOCK_V = 2048
VANISHED = tl.constexpr(-256.0)
"""A power of two that is 0, and times 0 is 0: in the entropy a logit of -inf adds nothing."""


@triton.jit
def _sums(
    row_ptr, bias_ptr, dlogits_row_ptr, last, base, V, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, WRITE: tl.constexpr, STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Over a row: ``Σ e``, ``Σ e·p``, ``Σ p`` and the largest ``y``, where ``e = 2^p = exp(z − base)``."""
    k = tl.arange(0, BLOCK_V)
    dtype = dlogits_row_ptr.dtype.element_ty
    tail = (V - 1) // BLOCK_V * BLOCK_V
    there = tail + k < V
    power, slope = powers(last, base, 0.0, softcap, SOFTCAP)
    total = tl.where(there, tl.exp2(power), 0.0)
    spread, power_sum, top = total, total, total
    if WRITE:
        tl.store(dlogits_row_ptr + tail + k, (-total * slope).to(dtype), mask=there)
    if STATISTICS:
        power = tl.where(there, power, 0.0)
        spread, power_sum, top = total * tl.maximum(power, VANISHED), power, last
    for start in range(0, tail, BLOCK_V):
        j = tl.multiple_of(start, BLOCK_V) + k
        y = load_scaled(row_ptr, bias_ptr, j, None, logit_scale, HAS_BIAS, SCALED)
        power, slope = powers(y, base, 0.0, softcap, SOFTCAP)
        e = tl.exp2(power)
        total += e
        if WRITE:
            tl.store(dlogits_row_ptr + j, (-e * slope).to(dtype))
        if STATISTICS:
            spread += e * tl.maximum(power, VANISHED)
            power_sum += power
            top = tl.maximum(top, y)
    return tl.sum(total, axis=0), tl.sum(spread, axis=0), tl.sum(power_sum, axis=0), tl.max(top, axis=0)


@triton.jit
def _largest(
    row_ptr, bias_ptr, last, V, logit_scale, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, BLOCK_V: tl.constexpr
):
    for start in range(0, (V - 1) // BLOCK_V * BLOCK_V, BLOCK_V):
        j = tl.multiple_of(start, BLOCK_V) + tl.arange(0, BLOCK_V)
        last = tl.maximum(last, load_scaled(row_ptr, bias_ptr, j, None, logit_scale, HAS_BIAS, SCALED))
    return tl.max(last, axis=0)


@triton.jit(do_not_specialize_on_alignment=["bias_ptr", "targets_ptr", "out_ptr"])
def linear_rows_kernel(
    logits_ptr,  # [rows, V] float32
    bias_ptr,  # [V] or unused
    targets_ptr,  # [rows]
    out_ptr,  # [4 or 6, rows] float32: hit, peak, log-total, scale, entropy, mean
    dlogits_ptr,  # [rows, V]; may be the logits themselves
    logits_stride,
    dlogits_stride,
    V,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_DLOGITS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    dlogits_row_ptr = dlogits_ptr + row * dlogits_stride
    target = tl.load(targets_ptr + row).to(tl.int64)
    inside = (target >= 0) & (target < V)
    target = tl.where(inside, target, 0).to(tl.int32)  # a register less to keep through the loops
    hit = load_scaled(row_ptr, bias_ptr, target, inside, logit_scale, HAS_BIAS, SCALED)
    j = (V - 1) // BLOCK_V * BLOCK_V + tl.arange(0, BLOCK_V)
    last = load_scaled(row_ptr, bias_ptr, j, j < V, logit_scale, HAS_BIAS, SCALED)

    peak = capped(tl.maximum(tl.max(last, axis=0), hit), softcap, SOFTCAP)
    total, spread, power_sum, top = _sums(
        row_ptr, bias_ptr, dlogits_row_ptr, last, peak, V, logit_scale, softcap,
        HAS_BIAS, SCALED, SOFTCAP, READ_ONCE, STATISTICS, BLOCK_V,
    )  # fmt: skip
    base = peak
    if not (total < LARGEST_TOTAL):  # or NaN: -inf − -inf
        last = load_scaled(row_ptr, bias_ptr, j, j < V, logit_scale, HAS_BIAS, SCALED)  # again: it was not kept
        top = _largest(row_ptr, bias_ptr, last, V, logit_scale, HAS_BIAS, SCALED, BLOCK_V)
        peak = capped(top, softcap, SOFTCAP)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total, spread, power_sum, top = _sums(
            row_ptr, bias_ptr, dlogits_row_ptr, last, base, V, logit_scale, softcap,
            HAS_BIAS, SCALED, SOFTCAP, READ_ONCE, STATISTICS, BLOCK_V,
        )  # fmt: skip
    log_total = tl.log(total)

    over, log_over = peak, log_total  # as they are told
    if STATISTICS:  # where the largest logit is known, it is the peak: then a hit of 0 says that the label is on top
        tl.store(out_ptr + 4 * rows + row, log_total - tl.log(2.0) * spread / total)
        tl.store(out_ptr + 5 * rows + row, base + tl.log(2.0) * power_sum / V)
        over = capped(top, softcap, SOFTCAP)
        log_over += tl.where(over == float("-inf"), 0.0, base - over)
    # A label outside the vocabulary cannot be reported from here without a sync: it becomes a NaN.
    tl.store(out_ptr + row, tl.where(inside, capped(hit, softcap, SOFTCAP) - over, float("nan")))
    tl.store(out_ptr + rows + row, over)
    tl.store(out_ptr + 2 * rows + row, log_over)
    tl.store(out_ptr + 3 * rows + row, logit_scale / total if READ_ONCE else 1.0)

    if READ_ONCE:
        write_label(dlogits_row_ptr + target, inside, hit, base, 0.0, total, 1.0, softcap, SOFTCAP)
    elif WRITE_DLOGITS:
        write_dlogits(
            row_ptr, bias_ptr, dlogits_row_ptr, 0, V, base, log_total, logit_scale, logit_scale, softcap,
            HAS_BIAS, SCALED, SOFTCAP, BLOCK_V,
        )  # fmt: skip
        write_label(dlogits_row_ptr + target, inside, hit, base, log_total, 1.0, logit_scale, softcap, SOFTCAP)


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
    """Returns hit (the label's logit less the peak), peak, log-total, scale and, asked for ``statistics``, entropy and
    mean of the logits, ``[4 or 6, rows]`` float32. Writes ``dlogits``, which may be ``logits``, unless None: times
    scale they are unit dlogits.
    """
    rows, V = logits.shape
    out = torch.empty((6 if statistics else 4, rows), dtype=torch.float32, device=logits.device)
    written = logits if dlogits is None else dlogits
    block_v = min(BLOCK_V, max(16, triton.next_power_of_2(V)))
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
            SCALED=logit_scale != 1,
            SOFTCAP=softcap != 0,
            WRITE_DLOGITS=dlogits is not None,
            READ_ONCE=written.dtype == torch.bfloat16,
            STATISTICS=statistics,
            BLOCK_V=block_v,
            num_warps=max(1, NUM_WARPS * block_v // BLOCK_V),
            enable_fp_fusion=True,
        )
    return out
