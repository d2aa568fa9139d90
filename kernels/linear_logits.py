"""What the two kernels of the linear path share: from raw logits to logits, and from those to dlogits."""

import triton
import triton.language as tl


@triton.jit
def head_logits(x, bias_ptr, j, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """``z = softcap·tanh(y/softcap)``, ``y = logit_scale·(x + bias)``, and ``dz/dx``."""
    if HAS_BIAS:
        x += tl.load(bias_ptr + j, mask=mask, other=0.0).to(tl.float32)
    z = x * logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32) * logit_scale
    if SOFTCAP:
        # tanh from exp of a negative number, which cannot overflow.
        u = z / softcap
        e = tl.exp(-2.0 * tl.abs(u))
        tanh = tl.where(u < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        z = softcap * tanh
        slope *= 1.0 - tanh * tanh
    return z, slope


@triton.jit
def load_logits(row_ptr, start, end, BLOCK_V: tl.constexpr):
    """A block of a row, zeros beyond its end; a mask would narrow the loads, so only the last block has one."""
    j = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= end:
        x = tl.load(row_ptr + j)
    else:
        x = tl.load(row_ptr + j, mask=j < end, other=0.0)
    return x, j


@triton.jit
def write_dlogits(
    logits_row_ptr,
    dlogits_row_ptr,
    bias_ptr,
    start,
    end,
    target,
    peak,
    log_total,
    w,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``w·(onehot − softmax)·dz/dx`` of a block of a row; may be written over the logits. With w = 1 they are unit
    dlogits: before the weight that the loss gives the row, which only backward knows.
    """
    x, j = load_logits(logits_row_ptr, start, end, BLOCK_V)
    z, slope = head_logits(x, bias_ptr, j, j < end, logit_scale, softcap, HAS_BIAS, SOFTCAP)
    dlogits = w * (((j == target).to(tl.float32) - tl.exp((z - peak) - log_total)) * slope)
    dlogits = dlogits.to(dlogits_row_ptr.dtype.element_ty)
    if start + BLOCK_V <= end:
        tl.store(dlogits_row_ptr + j, dlogits)
    else:
        tl.store(dlogits_row_ptr + j, dlogits, mask=j < end)
