"""What lies between the raw product and the log-softmax: bias, logit scale and softcap, shared by two kernels."""

import triton
import triton.language as tl


@triton.jit
def head_logits(x, bias_ptr, j, mask, scale, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """``z = softcap·tanh(y/softcap)``, ``y = scale·(x + bias)``, and ``dz/dx``."""
    if HAS_BIAS:
        x += tl.load(bias_ptr + j, mask=mask, other=0.0).to(tl.float32)
    z = x * scale
    slope = tl.full(z.shape, 1.0, tl.float32) * scale
    if SOFTCAP:
        # tanh from exp of a negative number, which cannot overflow.
        u = z / softcap
        e = tl.exp(-2.0 * tl.abs(u))
        tanh = tl.where(u < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        z = softcap * tanh
        slope *= 1.0 - tanh * tanh
    return z, slope
