"""``log σ(x)`` and ``exp(y) − 1`` to the last bits of float32, which Triton has no exact functions for."""

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):
    """``min(x, 0) − log1p(e)``, ``e = exp(−|x|)``; the series of atanh gives log1p to the last bit of float32."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # in (0, 1/3]
    s = z * z
    series = 1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))
    log1p = 2.0 * z * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * series))))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def expm1(y):
    """``exp(y) − 1`` for ``y <= 0``: Taylor where the subtraction would cancel."""
    tail = 1 / 120 + y * (1 / 720 + y * (1 / 5040 + y * (1 / 40320)))
    near = y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * tail))))
    return tl.where(y > -0.35, near, tl.exp(y) - 1.0)
