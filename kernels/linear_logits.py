"""What the kernels of the linear path share: from raw logits to powers of two, and from those to dlogits.

``z = softcap·tanh(y/softcap)``, ``y = logit_scale·(raw + bias)``; without softcap ``z = y``. What a head does not have
is not compiled.
"""

import triton
import triton.language as tl

from napo_loss.kernels.row import LOG2E


@triton.jit
def load_scaled(row_ptr, bias_ptr, j, mask, logit_scale, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """``y`` at ``j``; -inf where masked."""
    y = tl.load(row_ptr + j, mask=mask, other=None if mask is None else float("-inf"))
    if HAS_BIAS:
        y += tl.load(bias_ptr + j, mask=mask, other=None if mask is None else 0.0).to(tl.float32)
    if SCALED:
        y *= logit_scale
    return y


@triton.jit
def tanh_of(y, softcap):
    """``tanh(y/softcap) = (1 − e)/(1 + e)``, ``e = exp(−2·y/softcap)``, kept where its square is finite.

    Beside ``rsqrt``, one instruction everywhere, a division is six: it minds denominators that do not come up here.
    """
    e = tl.exp2(tl.minimum(y * (-2.0 * LOG2E / softcap), 60.0, propagate_nan=tl.PropagateNan.ALL))
    return (1.0 - e) * tl.rsqrt((1.0 + e) * (1.0 + e))


@triton.jit
def capped(y, softcap, SOFTCAP: tl.constexpr):
    """``z`` of a few."""
    return softcap * tanh_of(y, softcap) if SOFTCAP else y


@triton.jit
def powers(y, base, log2_total, softcap, SOFTCAP: tl.constexpr):
    """``log2(exp(z − base)/total)``, and ``dz/dy``."""
    if SOFTCAP:
        tanh = tanh_of(y, softcap)
        power, slope = tl.fma(tanh, softcap * LOG2E, -(base * LOG2E + log2_total)), 1.0 - tanh * tanh
    else:  # subtracted before it is scaled, so that a common offset of the logits loses nothing
        power, slope = (y - base) * LOG2E - log2_total, 1.0
    return power, slope


@triton.jit
def write_dlogits(
    row_ptr,
    bias_ptr,
    dlogits_row_ptr,
    low,  # a multiple of BLOCK_V
    high,
    peak,
    log_total,
    factor,  # of the row: its weight times logit_scale
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``−factor·softmax·slope`` from ``low`` to ``high`` of a row; may be written over the logits. The label's entry
    lacks its one: see :func:`write_label`.
    """
    k = tl.arange(0, BLOCK_V)
    dtype = dlogits_row_ptr.dtype.element_ty
    log2_total = log_total * LOG2E
    tail = low + tl.maximum(high - low - 1, 0) // BLOCK_V * BLOCK_V
    for start in range(low, tail, BLOCK_V):
        j = tl.multiple_of(start, BLOCK_V) + k
        y = load_scaled(row_ptr, bias_ptr, j, None, logit_scale, HAS_BIAS, SCALED)
        power, slope = powers(y, peak, log2_total, softcap, SOFTCAP)
        tl.store(dlogits_row_ptr + j, (-factor * tl.exp2(power) * slope).to(dtype))
    j = tail + k
    y = load_scaled(row_ptr, bias_ptr, j, j < high, logit_scale, HAS_BIAS, SCALED)
    power, slope = powers(y, peak, log2_total, softcap, SOFTCAP)
    tl.store(dlogits_row_ptr + j, (-factor * tl.exp2(power) * slope).to(dtype), mask=j < high)


@triton.jit
def write_label(ptr, mine, y, peak, log_total, one, factor, softcap, SOFTCAP: tl.constexpr):
    """``factor·(one − exp(z − peak)/exp(log_total))·slope``, the entry of the label, whose scaled logit is ``y``."""
    power, slope = powers(y, peak, log_total * LOG2E, softcap, SOFTCAP)
    dlogits = factor * (one - tl.exp2(power)) * slope
    tl.debug_barrier()  # written by all, before this entry is written again
    tl.store(ptr, dlogits.to(ptr.dtype.element_ty), mask=mine)
