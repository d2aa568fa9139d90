"""Sequence log-probs to losses, rewards, q and gradient weights: the whole objective in one program.

B is a micro-batch and K a handful, so one program does it all and its mean over the batch needs no second
launch. The unscaled gradient of every log-prob is written beside the losses: backward is one multiplication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import on_device

TILE = 1024  # elements of a [K, B] tile


@triton.jit
def _margins(
    policy_chosen_ptr,
    policy_rejected_ptr,
    reference_chosen_ptr,
    reference_rejected_ptr,
    chosen_length_ptr,
    rejected_length_ptr,
    b,
    k,
    B,
    K,
    MIN_LENGTH: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
):
    """Log-ratios ``[BLOCK_B]`` and ``[BLOCK_K, BLOCK_B]`` with the lengths of their sequences (1 if not given)."""
    in_b = b < B
    at = k[:, None] * B + b[None, :]
    inside = (k < K)[:, None] & in_b[None, :]
    chosen = tl.load(policy_chosen_ptr + b, mask=in_b, other=0.0).to(tl.float32)
    rejected = tl.load(policy_rejected_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_REFERENCE:
        chosen -= tl.load(reference_chosen_ptr + b, mask=in_b, other=0.0).to(tl.float32)
        rejected -= tl.load(reference_rejected_ptr + at, mask=inside, other=0.0).to(tl.float32)
    chosen_length = tl.full(chosen.shape, 1.0, tl.float32)
    rejected_length = tl.full(rejected.shape, 1.0, tl.float32)
    if HAS_LENGTH:
        chosen_length = tl.load(chosen_length_ptr + b, mask=in_b, other=1.0).to(tl.float32)
        rejected_length = tl.load(rejected_length_ptr + at, mask=inside, other=1.0).to(tl.float32)
        chosen_length = tl.maximum(chosen_length, MIN_LENGTH)
        rejected_length = tl.maximum(rejected_length, MIN_LENGTH)
    return chosen, rejected, chosen_length, rejected_length, in_b, inside, at


@triton.jit
def _log_sigmoid(x):
    """``min(x, 0) − log1p(e)``, ``e = exp(−|x|)``; the series of atanh gives log1p to the last bit of float32."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # in (0, 1/3]
    s = z * z
    series = 1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))
    log1p = 2.0 * z * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * series))))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _expm1(y):
    """``exp(y) − 1`` for ``y <= 0``: Taylor where the subtraction would cancel."""
    tail = 1 / 120 + y * (1 / 720 + y * (1 / 5040 + y * (1 / 40320)))
    near = y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * tail))))
    return tl.where(y > -0.35, near, tl.exp(y) - 1.0)


@triton.jit
def objective_kernel(
    policy_chosen_ptr,  # [B]
    policy_rejected_ptr,  # [K, B]
    reference_chosen_ptr,
    reference_rejected_ptr,
    chosen_length_ptr,
    rejected_length_ptr,
    settings_ptr,  # [4, K]: α, whether q reads per-token means, fixed q or NaN, weight
    previous_q_ptr,  # [K] or unused
    means_ptr,  # [2, K]: mean margin for q, mean reward margin
    losses_ptr,  # [B]
    chosen_rewards_ptr,  # [B]
    rejected_rewards_ptr,  # [K, B]
    q_ptr,  # [K]
    weights_ptr,  # [K]
    grads_ptr,  # [1 + K, B]: dloss_b/dlogπ
    B,
    K,
    beta,
    sft_weight,
    decay,
    Q_LOW: tl.constexpr,
    Q_HIGH: tl.constexpr,
    MIN_Q: tl.constexpr,
    WEIGHT_FLOOR: tl.constexpr,
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
    alpha = tl.load(settings_ptr + k, mask=in_k, other=1.0)
    reads_mean = tl.load(settings_ptr + K + k, mask=in_k, other=0.0) != 0
    fixed_q = tl.load(settings_ptr + 2 * K + k, mask=in_k, other=0.0)
    weight = tl.load(settings_ptr + 3 * K + k, mask=in_k, other=0.0)

    if COMPUTE_MEANS:
        seen_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
        psi_sum = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, at = _margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE, HAS_LENGTH,
            )  # fmt: skip
            sum_margin = chosen[None, :] - rejected
            mean_margin = (chosen / chosen_length)[None, :] - rejected / rejected_length
            seen_sum += tl.where(inside, tl.where(reads_mean[:, None], mean_margin, sum_margin), 0.0)
            psi_sum += tl.where(inside, mean_margin if AVERAGE else sum_margin, 0.0)
        mean_seen = tl.sum(seen_sum, axis=1) / B
        mean_reward = beta * (tl.sum(psi_sum, axis=1) / B)
        tl.store(means_ptr + k, mean_seen, mask=in_k)
        tl.store(means_ptr + K + k, mean_reward, mask=in_k)
    else:
        mean_seen = tl.load(means_ptr + k, mask=in_k, other=0.0)
        mean_reward = tl.load(means_ptr + K + k, mask=in_k, other=0.0)

    if COMPUTE_LOSS:
        q = 2.0 / (1.0 + tl.exp(alpha * mean_seen))
        q = tl.where(q < Q_LOW, Q_LOW, tl.where(q > Q_HIGH, Q_HIGH, q))  # a NaN margin stays a NaN q
        if HAS_PREVIOUS:
            q = decay * tl.load(previous_q_ptr + k, mask=in_k, other=0.0) + (1.0 - decay) * q
        q = tl.where(fixed_q == fixed_q, fixed_q, q)
        if DYNAMIC:
            gain = tl.where(in_k & (mean_reward > 0), mean_reward, 0.0)
            total = tl.sum(gain, axis=0)
            share = tl.where(total > 0, gain / tl.where(total > 0, total, 1.0), 1.0 / K)
            weight = tl.where(in_k, tl.maximum(share, WEIGHT_FLOOR), 0.0)
        tl.store(q_ptr + k, q, mask=in_k)
        tl.store(weights_ptr + k, weight, mask=in_k)

        is_dpo = (q < MIN_Q)[:, None]
        safe_q = tl.where(is_dpo, 1.0, q[:, None])
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            chosen, rejected, chosen_length, rejected_length, in_b, inside, at = _margins(
                policy_chosen_ptr, policy_rejected_ptr, reference_chosen_ptr, reference_rejected_ptr,
                chosen_length_ptr, rejected_length_ptr, b, k, B, K, MIN_LENGTH, HAS_REFERENCE, HAS_LENGTH,
            )  # fmt: skip
            policy = tl.load(policy_chosen_ptr + b, mask=in_b, other=0.0).to(tl.float32)
            if AVERAGE:
                chosen /= chosen_length
                rejected /= rejected_length
                policy /= chosen_length
            x = beta * (chosen[None, :] - rejected)
            log_p = _log_sigmoid(x)
            y = q[:, None] * log_p
            loss = tl.where(is_dpo, -log_p, -_expm1(y) / safe_q)
            loss = tl.sum(tl.where(inside, weight[:, None] * loss, 0.0), axis=0) - sft_weight * policy
            tl.store(losses_ptr + b, loss, mask=in_b)
            tl.store(chosen_rewards_ptr + b, beta * chosen, mask=in_b)
            tl.store(rejected_rewards_ptr + at, beta * rejected, mask=inside)

            e = tl.exp(-tl.abs(x))
            not_p = tl.where(x >= 0, e, 1.0) / (1.0 + e)
            grad = tl.where(inside, -beta * weight[:, None] * tl.exp(y) * not_p, 0.0)  # dloss/dψ
            grad_chosen = tl.sum(grad, axis=0) - sft_weight
            if AVERAGE:
                grad_chosen /= chosen_length
                grad /= rejected_length
            tl.store(grads_ptr + b, grad_chosen, mask=in_b)
            tl.store(grads_ptr + B + at, -grad, mask=inside)


class Constants(NamedTuple):
    """The published constants, which the kernel shares with the eager path."""

    Q_LOW: float
    Q_HIGH: float
    MIN_Q: float
    WEIGHT_FLOOR: float
    MIN_LENGTH: float


def objective(
    logps: tuple[torch.Tensor | None, ...],
    settings: torch.Tensor,
    previous_q: torch.Tensor | None,
    means: torch.Tensor | None,
    scalars: tuple[float, float, float],
    constants: Constants,
    *,
    switches: dict[str, bool],
) -> tuple[torch.Tensor, ...]:
    """Launches the program. ``logps``: policy, reference and length of ``[B]`` chosen and ``[K, B]`` rejected.

    Returns ``means [2, K]`` and, with ``COMPUTE_LOSS``, losses, rewards, q, weights and ``grads [1 + K, B]``.
    """
    given = [None if x is None else x.contiguous() for x in logps]
    policy_chosen, policy_rejected = given[0], given[1]
    assert policy_chosen is not None
    assert policy_rejected is not None
    K, B = policy_rejected.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=policy_chosen.device)  # noqa: E731
    compute_means = means is None
    outputs = (
        new(2, K) if means is None else means,
        new(B),
        new(B),
        new(K, B),
        new(K),
        new(K),
        new(1 + K, B),
    )
    block_k = triton.next_power_of_2(K)
    with on_device(policy_chosen):
        objective_kernel[(1,)](
            *(policy_chosen if x is None else x for x in given),
            settings,
            settings if previous_q is None else previous_q,
            *outputs,
            B,
            K,
            *scalars,
            **constants._asdict(),
            HAS_REFERENCE=given[2] is not None,
            HAS_LENGTH=given[4] is not None,
            HAS_PREVIOUS=previous_q is not None,
            COMPUTE_MEANS=compute_means,
            **switches,
            BLOCK_K=block_k,
            BLOCK_B=max(1, min(triton.next_power_of_2(B), TILE // block_k)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return outputs
