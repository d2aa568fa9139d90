"""What both passes of the objective read, and how moments are smoothed."""

import triton
import triton.language as tl


@triton.jit
def margins(
    policy_chosen_ptr,
    policy_rejected_ptr,
    reference_chosen_ptr,
    reference_rejected_ptr,
    chosen_length_ptr,
    rejected_length_ptr,
    pair_mask_ptr,
    b,
    k,
    B,
    K,
    MIN_LENGTH: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Log-ratios ``[BLOCK_B]`` and ``[BLOCK_K, BLOCK_B]`` with the lengths of their sequences (1 if not given).

    What does not count is not read: 0, of length 1.
    """
    in_b = b < B
    at = k[:, None] * B + b[None, :]
    inside = (k < K)[:, None] & in_b[None, :]
    counts_b = in_b
    counts = inside
    if HAS_MASK:
        counts = inside & (tl.load(pair_mask_ptr + at, mask=inside, other=0) != 0)
        counts_b = tl.max(counts.to(tl.int32), axis=0) != 0
    chosen = tl.load(policy_chosen_ptr + b, mask=counts_b, other=0.0).to(DTYPE)
    rejected = tl.load(policy_rejected_ptr + at, mask=counts, other=0.0).to(DTYPE)
    if HAS_REFERENCE:
        chosen -= tl.load(reference_chosen_ptr + b, mask=counts_b, other=0.0).to(DTYPE)
        rejected -= tl.load(reference_rejected_ptr + at, mask=counts, other=0.0).to(DTYPE)
    chosen_length = tl.full(chosen.shape, 1.0, DTYPE)
    rejected_length = tl.full(rejected.shape, 1.0, DTYPE)
    if HAS_LENGTH:
        chosen_length = tl.load(chosen_length_ptr + b, mask=counts_b, other=1.0).to(DTYPE)
        rejected_length = tl.load(rejected_length_ptr + at, mask=counts, other=1.0).to(DTYPE)
        chosen_length = tl.maximum(chosen_length, MIN_LENGTH)
        rejected_length = tl.maximum(rejected_length, MIN_LENGTH)
    return chosen, rejected, chosen_length, rejected_length, in_b, inside, counts_b, counts, at


@triton.jit
def smooth(now, before, decay):
    """An infinite or NaN history is none."""
    return decay * tl.where(tl.abs(before) < float("inf"), before, now) + (1.0 - decay) * now
