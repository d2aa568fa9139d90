"""Sequence log-probs to losses, rewards, q and gradient weights: the whole objective in one program.

B is a micro-batch and K a handful, so one program does it all and its mean over the batch needs no second
launch. The unscaled gradient of every log-prob is written beside the losses: backward is one multiplication.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import on_device
from napo_loss.kernels.objective_margins import margins, smooth
from napo_loss.kernels.objective_records import Constants
from napo_loss.kernels.sigmoid import expm1, log_sigmoid

TILE = 1024  # elements of a [K, B] tile
SHORT = 32  # columns of one for few pairs: two tiles, so that batches do not compile kernels
OUTPUTS = ("losses", "rewards", "dlogps", "found")


@triton.jit
def _of(ptr, i, k, K, other):
    """Row ``i`` of ``[…, K]``."""
    return tl.load(ptr + i * K + k, mask=k < K, other=other)


@triton.jit(
    do_not_specialize=["B", "K"],
    do_not_specialize_on_alignment=[
        "policy_chosen_ptr", "policy_rejected_ptr", "reference_chosen_ptr", "reference_rejected_ptr",
        "chosen_length_ptr", "rejected_length_ptr", "pair_mask_ptr", "previous_ptr", "means_ptr",
    ],
)  # fmt: skip
def objective_kernel(
    policy_chosen_ptr,  # [B]
    policy_rejected_ptr,  # [K, B]
    reference_chosen_ptr,
    reference_rejected_ptr,
    chosen_length_ptr,
    rejected_length_ptr,
    pair_mask_ptr,  # [K, B], bytes: 0 where a pair does not count
    settings_ptr,  # [6, K]: slope, top, low, reads_mean, fixed_q, weight; see NegativeNumbers
    previous_ptr,  # [2, K] or unused: the moments of the step before
    means_ptr,  # [3, K]: of the margins that q is read from, of their squares, of ψ as the loss reads it
    losses_ptr,  # [B]
    rewards_ptr,  # [1 + K, B]
    dlogps_ptr,  # [1 + K, B]: dloss_b/dlogπ
    found_ptr,  # [4, K]: q, weight, and the first two means, smoothed
    B,
    K,
    beta,
    sft_weight,
    decay,
    MIN_Q: tl.constexpr,
    WEIGHT_FLOOR: tl.constexpr,
    WEIGHT_PRIOR: tl.constexpr,
    MOST_GAIN: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    AVERAGE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    COMPUTE_MEANS: tl.constexpr,
    COMPUTE_LOSS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    in_k = k < K
    slope = _of(settings_ptr, 0, k, K, 1.0)
    top = _of(settings_ptr, 1, k, K, 1.0)
    low = _of(settings_ptr, 2, k, K, 0.0)
    reads_mean = _of(settings_ptr, 3, k, K, 0.0) != 0
    fixed_q = _of(settings_ptr, 4, k, K, 0.0)
    weight = _of(settings_ptr, 5, k, K, 0.0)

    if COMPUTE_MEANS:
        # In float64: margins of both signs cancel, and what is left of a mean decides q.
        seen_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        square_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        psi_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        if HAS_MASK:
            counted = tl.zeros([BLOCK_K, BLOCK_B], tl.int32)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, counts_b, counts, at = margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, pair_mask_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE,
                HAS_LENGTH, HAS_MASK, tl.float64,
            )  # fmt: skip
            sum_margin = chosen[None, :] - rejected
            mean_margin = (chosen / chosen_length)[None, :] - rejected / rejected_length
            seen = tl.where(counts, tl.where(reads_mean[:, None], mean_margin, sum_margin), 0.0)
            seen_sum += seen
            square_sum += seen * seen
            psi_sum += tl.where(counts, mean_margin if AVERAGE else sum_margin, 0.0)
            if HAS_MASK:
                counted += counts.to(tl.int32)
        pairs = tl.maximum(tl.sum(counted, axis=1), 1) if HAS_MASK else B
        seen_mean = (tl.sum(seen_sum, axis=1) / pairs).to(tl.float32)
        seen_square = (tl.sum(square_sum, axis=1) / pairs).to(tl.float32)
        margin_mean = (tl.sum(psi_sum, axis=1) / pairs).to(tl.float32)
    else:
        seen_mean = _of(means_ptr, 0, k, K, 0.0)
        seen_square = _of(means_ptr, 1, k, K, 0.0)
        margin_mean = _of(means_ptr, 2, k, K, 0.0)

    if COMPUTE_LOSS:
        if HAS_PREVIOUS:
            seen_mean = smooth(seen_mean, _of(previous_ptr, 0, k, K, 0.0), decay)
            seen_square = smooth(seen_square, _of(previous_ptr, 1, k, K, 0.0), decay)
        rms = tl.sqrt(seen_square)
        # An infinite margin leaves nothing to read: q is 1, as where all are 0.
        by_moments = 1.0 - tl.where(rms == float("inf"), 0.0, seen_mean / tl.where(rms == 0, 1.0, rms))
        q = tl.where(slope >= 0, top / (1.0 + tl.exp(slope * seen_mean)), by_moments)
        q = tl.where(q < low, low, tl.where(q > 1.0, 1.0, q))  # a NaN margin stays a NaN q
        q = tl.where(fixed_q >= 0, fixed_q, q)
        if DYNAMIC:
            gain = tl.where(margin_mean < 0, 0.0, tl.where(margin_mean > MOST_GAIN, MOST_GAIN, margin_mean))
            gain = tl.where(in_k, gain + WEIGHT_PRIOR, 0.0)
            share = gain / tl.sum(gain, axis=0)
            weight = tl.where(in_k, tl.where(share < WEIGHT_FLOOR, WEIGHT_FLOOR, share), 0.0)
        tl.store(found_ptr + k, q, mask=in_k)
        tl.store(found_ptr + K + k, weight, mask=in_k)
        tl.store(found_ptr + 2 * K + k, seen_mean, mask=in_k)
        tl.store(found_ptr + 3 * K + k, seen_square, mask=in_k)

        is_dpo = (q < MIN_Q)[:, None]
        safe_q = tl.where(is_dpo, 1.0, q[:, None])
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, counts_b, counts, at = margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, pair_mask_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE,
                HAS_LENGTH, HAS_MASK, tl.float32,
            )  # fmt: skip
            policy = tl.load(policy_chosen_ptr + b, mask=counts_b, other=0.0).to(tl.float32)
            if AVERAGE:
                chosen /= chosen_length
                rejected /= rejected_length
                policy /= chosen_length
            x = beta * (chosen[None, :] - rejected)
            log_p = log_sigmoid(x)
            y = safe_q * log_p  # not 0·−inf, of a sequence that the policy excludes
            loss = tl.where(is_dpo, -log_p, -expm1(y) / safe_q)
            weighs = counts & (weight != 0)[:, None]
            loss = tl.sum(tl.where(weighs, weight[:, None] * loss, 0.0), axis=0)
            loss -= tl.where(sft_weight != 0, sft_weight * policy, 0.0)
            tl.store(losses_ptr + b, loss, mask=in_b)
            tl.store(rewards_ptr + b, beta * chosen, mask=in_b)
            tl.store(rewards_ptr + B + at, beta * rejected, mask=inside)

            e = tl.exp(-tl.abs(x))
            not_p = tl.where(x >= 0, e, 1.0) / (1.0 + e)
            to_q = tl.where(is_dpo, 1.0, tl.exp(y))  # σ(x)^q
            grad = tl.where(counts, -beta * weight[:, None] * to_q * not_p, 0.0)  # dloss/dψ
            grad_chosen = tl.sum(grad, axis=0) - (tl.where(counts_b, sft_weight, 0.0) if HAS_MASK else sft_weight)
            if AVERAGE:
                grad_chosen /= chosen_length
                grad /= rejected_length
            tl.store(dlogps_ptr + b, grad_chosen, mask=in_b)
            tl.store(dlogps_ptr + B + at, -grad, mask=inside)
    else:  # the means of this rank, which others wait for
        tl.store(means_ptr + k, seen_mean, mask=in_k)
        tl.store(means_ptr + K + k, seen_square, mask=in_k)
        tl.store(means_ptr + 2 * K + k, margin_mean, mask=in_k)


def objective(
    logps: dict[str, torch.Tensor | None],  # [B] of the chosen, [K, B] of the negatives; see BatchLogps
    settings: torch.Tensor,  # [6, K]
    previous: torch.Tensor | None,  # [2, K]
    means: torch.Tensor | None,  # [3, K]
    out: dict[str, torch.Tensor] | None,  # by the names of OUTPUTS
    constants: Constants,
    *,
    average: bool,  # the loss reads per-token means
    dynamic: bool,  # weights are shares of the mean reward margins
    beta: float,
    sft_weight: float = 0.0,
    decay: float = 0.0,
) -> None:
    """Writes ``out``, with the ``means`` of all ranks where they are given; without ``out`` it writes ``means``."""
    unused = policy_chosen = logps["policy_chosen"]
    policy_rejected = logps["policy_rejected"]
    assert policy_chosen is not None
    assert policy_rejected is not None
    K, B = policy_rejected.shape
    mask = logps.get("pair_mask")  # a byte each
    logps = {**logps, "pair_mask": None if mask is None else mask.contiguous().view(torch.uint8)}
    given = dict.fromkeys(OUTPUTS) | logps | (out or {}) | {"settings": settings, "previous": previous, "means": means}
    block_k = triton.next_power_of_2(K)
    long = max(1, TILE // block_k)
    with on_device(policy_chosen):
        objective_kernel[(1,)](
            **{f"{name}_ptr": unused if x is None else x.contiguous() for name, x in given.items()},
            B=B,
            K=K,
            beta=beta,
            sft_weight=sft_weight,
            decay=decay,
            **constants._asdict(),
            HAS_REFERENCE=logps["reference_chosen"] is not None,
            HAS_LENGTH=logps["chosen_length"] is not None,
            HAS_MASK=mask is not None,
            HAS_PREVIOUS=previous is not None,
            AVERAGE=average,
            DYNAMIC=dynamic,
            COMPUTE_MEANS=out is None or means is None,
            COMPUTE_LOSS=out is not None,
            BLOCK_K=block_k,
            BLOCK_B=long if B > SHORT else min(SHORT, long),
            num_warps=4,
            enable_fp_fusion=True,
        )
