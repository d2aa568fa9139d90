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
from napo_loss.kernels.objective_records import Constants, Outputs, Settings, Switches
from napo_loss.kernels.sigmoid import expm1, log_sigmoid

TILE = 1024  # elements of a [K, B] tile


@triton.jit
def objective_kernel(
    policy_chosen_ptr,  # [B]
    policy_rejected_ptr,  # [K, B]
    reference_chosen_ptr,
    reference_rejected_ptr,
    chosen_length_ptr,
    rejected_length_ptr,
    slope_ptr,  # [K]: α, or NaN for the moment estimator
    top_ptr,  # [K]: q at a margin of -inf
    low_ptr,  # [K]: the smallest q
    reads_mean_ptr,  # [K]: whether q is read from per-token means, 0 or 1
    fixed_q_ptr,  # [K]: NaN where q is estimated
    weight_ptr,  # [K]
    previous_mean_ptr,  # [K] or unused
    previous_square_ptr,  # [K] or unused
    seen_mean_ptr,  # [K]: of the margins that q is read from
    seen_square_ptr,  # [K]: of their squares
    margin_mean_ptr,  # [K]: of ψ as the loss reads it
    losses_ptr,  # [B]
    chosen_rewards_ptr,  # [B]
    rejected_rewards_ptr,  # [K, B]
    q_ptr,  # [K]
    weights_ptr,  # [K]
    moment_mean_ptr,  # [K]: seen_mean, smoothed
    moment_square_ptr,  # [K]
    dlogps_ptr,  # [1 + K, B]: dloss_b/dlogπ
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
    slope = tl.load(slope_ptr + k, mask=in_k, other=1.0)
    top = tl.load(top_ptr + k, mask=in_k, other=1.0)
    low = tl.load(low_ptr + k, mask=in_k, other=0.0)
    reads_mean = tl.load(reads_mean_ptr + k, mask=in_k, other=0.0) != 0
    fixed_q = tl.load(fixed_q_ptr + k, mask=in_k, other=0.0)
    weight = tl.load(weight_ptr + k, mask=in_k, other=0.0)

    if COMPUTE_MEANS:
        # In float64: margins of both signs cancel, and what is left of a mean decides q.
        seen_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        square_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        psi_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float64)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, at = margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE, HAS_LENGTH,
                tl.float64,
            )  # fmt: skip
            sum_margin = chosen[None, :] - rejected
            mean_margin = (chosen / chosen_length)[None, :] - rejected / rejected_length
            seen = tl.where(inside, tl.where(reads_mean[:, None], mean_margin, sum_margin), 0.0)
            seen_sum += seen
            square_sum += seen * seen
            psi_sum += tl.where(inside, mean_margin if AVERAGE else sum_margin, 0.0)
        seen_mean = (tl.sum(seen_sum, axis=1) / B).to(tl.float32)
        seen_square = (tl.sum(square_sum, axis=1) / B).to(tl.float32)
        margin_mean = (tl.sum(psi_sum, axis=1) / B).to(tl.float32)
        tl.store(seen_mean_ptr + k, seen_mean, mask=in_k)
        tl.store(seen_square_ptr + k, seen_square, mask=in_k)
        tl.store(margin_mean_ptr + k, margin_mean, mask=in_k)
    else:
        seen_mean = tl.load(seen_mean_ptr + k, mask=in_k, other=0.0)
        seen_square = tl.load(seen_square_ptr + k, mask=in_k, other=0.0)
        margin_mean = tl.load(margin_mean_ptr + k, mask=in_k, other=0.0)

    if COMPUTE_LOSS:
        if HAS_PREVIOUS:
            before = tl.load(previous_mean_ptr + k, mask=in_k, other=0.0)
            seen_mean = smooth(seen_mean, before, decay)
            before = tl.load(previous_square_ptr + k, mask=in_k, other=0.0)
            seen_square = smooth(seen_square, before, decay)
        tl.store(moment_mean_ptr + k, seen_mean, mask=in_k)
        tl.store(moment_square_ptr + k, seen_square, mask=in_k)
        rms = tl.sqrt(seen_square)
        # An infinite margin leaves nothing to read: q is 1, as where all are 0.
        by_moments = 1.0 - tl.where(rms == float("inf"), 0.0, seen_mean / tl.where(rms == 0, 1.0, rms))
        q = tl.where(slope == slope, top / (1.0 + tl.exp(slope * seen_mean)), by_moments)
        q = tl.where(q < low, low, tl.where(q > 1.0, 1.0, q))  # a NaN margin stays a NaN q
        q = tl.where(fixed_q == fixed_q, fixed_q, q)
        if DYNAMIC:
            gain = tl.where(margin_mean < 0, 0.0, tl.where(margin_mean > MOST_GAIN, MOST_GAIN, margin_mean))
            gain = tl.where(in_k, gain + WEIGHT_PRIOR, 0.0)
            share = gain / tl.sum(gain, axis=0)
            weight = tl.where(in_k, tl.where(share < WEIGHT_FLOOR, WEIGHT_FLOOR, share), 0.0)
        tl.store(q_ptr + k, q, mask=in_k)
        tl.store(weights_ptr + k, weight, mask=in_k)

        is_dpo = (q < MIN_Q)[:, None]
        safe_q = tl.where(is_dpo, 1.0, q[:, None])
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, at = margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE, HAS_LENGTH,
                tl.float32,
            )  # fmt: skip
            policy = tl.load(policy_chosen_ptr + b, mask=in_b, other=0.0).to(tl.float32)
            if AVERAGE:
                chosen /= chosen_length
                rejected /= rejected_length
                policy /= chosen_length
            x = beta * (chosen[None, :] - rejected)
            log_p = log_sigmoid(x)
            y = safe_q * log_p  # not 0·−inf, of a sequence that the policy excludes
            loss = tl.where(is_dpo, -log_p, -expm1(y) / safe_q)
            weighs = inside & (weight != 0)[:, None]
            loss = tl.sum(tl.where(weighs, weight[:, None] * loss, 0.0), axis=0)
            loss -= tl.where(sft_weight != 0, sft_weight * policy, 0.0)
            tl.store(losses_ptr + b, loss, mask=in_b)
            tl.store(chosen_rewards_ptr + b, beta * chosen, mask=in_b)
            tl.store(rejected_rewards_ptr + at, beta * rejected, mask=inside)

            e = tl.exp(-tl.abs(x))
            not_p = tl.where(x >= 0, e, 1.0) / (1.0 + e)
            to_q = tl.where(is_dpo, 1.0, tl.exp(y))  # σ(x)^q
            grad = tl.where(inside, -beta * weight[:, None] * to_q * not_p, 0.0)  # dloss/dψ
            grad_chosen = tl.sum(grad, axis=0) - sft_weight
            if AVERAGE:
                grad_chosen /= chosen_length
                grad /= rejected_length
            tl.store(dlogps_ptr + b, grad_chosen, mask=in_b)
            tl.store(dlogps_ptr + B + at, -grad, mask=inside)


def objective(
    logps: dict[str, torch.Tensor | None],  # [B] of the chosen, [K, B] of the negatives; see BatchLogps
    settings: Settings,
    previous_moments: torch.Tensor | None,  # [2, K]
    means: torch.Tensor | None,  # [3, K], where they come from all ranks
    constants: Constants,
    switches: Switches,
    *,
    beta: float,
    sft_weight: float = 0.0,
    decay: float = 0.0,
) -> Outputs:
    """Launches the program. Without ``COMPUTE_LOSS`` only the means are written."""
    given = {name: None if x is None else x.contiguous() for name, x in logps.items()}
    unused = policy_chosen = given["policy_chosen"]
    policy_rejected = given["policy_rejected"]
    assert policy_chosen is not None
    assert policy_rejected is not None
    K, B = policy_rejected.shape

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=policy_chosen.device)

    outputs = Outputs(
        means=new(3, K) if means is None else means.contiguous(), losses=new(B), chosen_rewards=new(B),
        rejected_rewards=new(K, B), q=new(K), weights=new(K), moments=new(2, K), dlogps=new(1 + K, B),
    )  # fmt: skip
    pointers = {name: unused if x is None else x for name, x in given.items()}
    pointers |= settings._asdict() | outputs._asdict()
    previous = (unused, unused) if previous_moments is None else previous_moments.contiguous()
    pointers["previous_mean"], pointers["previous_square"] = previous
    pointers["moment_mean"], pointers["moment_square"] = pointers.pop("moments")
    pointers["seen_mean"], pointers["seen_square"], pointers["margin_mean"] = pointers.pop("means")
    block_k = triton.next_power_of_2(K)
    with on_device(policy_chosen):
        objective_kernel[(1,)](
            **{f"{name}_ptr": x for name, x in pointers.items()},
            B=B,
            K=K,
            beta=beta,
            sft_weight=sft_weight,
            decay=decay,
            **constants._asdict(),
            **switches._asdict(),
            HAS_REFERENCE=given["reference_chosen"] is not None,
            HAS_LENGTH=given["chosen_length"] is not None,
            HAS_PREVIOUS=previous_moments is not None,
            COMPUTE_MEANS=means is None,
            BLOCK_K=block_k,
            BLOCK_B=max(1, min(triton.next_power_of_2(B), TILE // block_k)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs
