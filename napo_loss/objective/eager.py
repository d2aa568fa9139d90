"""The objective in plain tensor operations, the twin of its kernel: float32 at least, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.objective.estimators import BOUNDS, Moments, mean_of_counted, q_of, smooth
from napo_loss.objective.negatives import PreferenceBatch
from napo_loss.objective.recipes import Negative, Recipe
from napo_loss.parallel.reductions import mean_over_group
from napo_loss.types import MIN_LENGTH, NaPOOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_Q = 1e-30
"""Below this q·log p may be a float32 denormal; L_q there equals DPO to the last bit."""

WEIGHT_FLOOR = 0.01
"""The smallest share a negative keeps under dynamic weights, as the paper prints."""

WEIGHT_PRIOR = 0.05
"""Nats that every negative has learned already, to dynamic weights: against them rounding noise is nothing."""

MOST_GAIN = 1e30
"""Nats beyond which a gain counts as this: of an infinite one there are no shares."""


def objective(
    batch: PreferenceBatch,
    beta: float | Tensor,
    recipe: Recipe,
    previous_moments: Tensor | None,  # [2, K]
    process_group: ProcessGroup | None,
    means: Tensor | None = None,  # [3, K], where they are of more than this batch, smoothed already
) -> NaPOOutput:
    """The objective in plain tensor operations, differentiable any number of times.

    At a few hundred numbers every operation costs the same, so what Python knows is not asked of tensors.
    """
    chosen, rejected, psi, seen = margins_of(batch)
    if isinstance(beta, Tensor):
        beta = beta.to(psi.dtype)  # beside the scalar mean of one negative a float64 β would make q and losses float64
    if means is None:
        count, by_count = batch.logps.pairs(), recipe.q_from == "all_pairs"
        means = mean_over_group(means_of(psi, seen, count), count, by_count=by_count, process_group=process_group)
    moments, margins = means[:2], means[2]
    if recipe.q_from == "each_pair":
        moments = torch.stack([seen, seen * seen])  # [2, K, B]
    moments = smooth(moments, previous_moments, recipe.decay)
    q = _q_of_negatives(batch.negatives, moments, beta)
    weights = dynamic_weights(margins) if batch.dynamic else _fixed_weights(batch.negatives, margins)
    log_p = F.logsigmoid(beta * psi)
    losses = _transform(log_p, q if q.dim() == 2 else q[:, None], least=min(map(_least_q, batch.negatives)))
    losses = weights[:, None] * losses
    if not batch.dynamic and any(n.weight == 0 for n in batch.negatives):
        # What has no weight is not there: zero times the infinite loss of an excluded sequence would be NaN.
        losses = torch.where(weights[:, None] == 0, 0.0, losses)
    losses = where(batch.logps.pair_mask, losses).sum(0)
    if recipe.sft_weight:
        losses = losses - sft_of(batch, recipe)
    return NaPOOutput(losses, (beta * chosen).detach(), (beta * rejected).detach(), q.detach(), weights, moments)


def sft_of(batch: PreferenceBatch, recipe: Recipe) -> Tensor:
    """``sft_weight·log π(y_w)``, ``[B]``."""
    logps = batch.logps.counted()
    sft = recipe.sft_weight * upcast(logps.policy_chosen)
    if batch.average and logps.chosen_length is not None:
        sft = sft / logps.chosen_length.clamp_min(MIN_LENGTH)
    return sft


class Margins(NamedTuple):
    """What the loss reads: log-ratios and margins, of sums or of per-token means."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [K, B]
    psi: Tensor  # [K, B]
    seen: Tensor  # [K, B], detached: the margins that q is read from


def margins_of(batch: PreferenceBatch) -> Margins:
    """Margins of 0 where a pair does not count."""
    logps = batch.logps.counted()
    chosen = log_ratio(logps.policy_chosen, logps.reference_chosen)
    rejected = log_ratio(logps.policy_rejected, logps.reference_rejected)
    by_sum = by_mean = where(logps.pair_mask, chosen - rejected)
    if logps.chosen_length is not None and logps.rejected_length is not None:
        chosen_length = logps.chosen_length.clamp_min(MIN_LENGTH)
        rejected_length = logps.rejected_length.clamp_min(MIN_LENGTH)
        by_mean = where(logps.pair_mask, chosen / chosen_length - rejected / rejected_length)
        if batch.average:
            chosen, rejected = chosen / chosen_length, rejected / rejected_length
    psi = by_mean if batch.average else by_sum
    seen = psi.detach()
    if by_mean is not psi and any(map(batch.reads_mean, batch.negatives)):
        mean = by_mean.detach()
        seen = torch.stack([(mean if batch.reads_mean(n) else seen)[k] for k, n in enumerate(batch.negatives)])
    return Margins(chosen, rejected, psi, seen)


def where(mask: Tensor | None, margins: Tensor) -> Tensor:
    """0 where a pair does not count, which may have the chosen of one that does."""
    return margins if mask is None else torch.where(mask, margins, 0.0)


def means_of(psi: Tensor, seen: Tensor, count: int | Tensor) -> Tensor:
    """``[3, K]``: the means of the margin behind q, of its square, and of the margin of the loss."""
    return mean_of_counted(torch.stack([seen, seen * seen, psi.detach()]), count)


def dynamic_weights(margins: Tensor) -> Tensor:
    """Each negative's share of the summed mean margins, floored at 0.01, from equal shares at the start.

    ``γ_i = max(0.01, (gain_i + ε) / (Σ gain + K·ε))``, ``gain_i = max(ψ̄_i, 0)``, ε = 0.05 nat. The paper prints
    ``ψ_i / Σ ψ``, in which β cancels: a share of noise while nothing is learned, and undefined where the sum is not
    positive. Here rounding noise of 0.01 nat moves no weight by more than 0.05; of three negatives the weights agree
    with the printed ones to 0.03 once the sum is 3.5 nats (rewards of 0.35 at β = 0.1).

    Args:
        margins: mean ψ of each negative in nats, of what the loss reads, ``[K]``.
    """
    gain = margins.clamp(0.0, MOST_GAIN) + WEIGHT_PRIOR
    return (gain / gain.sum()).clamp_min(WEIGHT_FLOOR)


def box_cox(x: Tensor, q: float | Tensor) -> Tensor:
    """``(1 − σ(x)^q)/q`` without its pitfalls: exact at q = 0, no overflow and no NaN gradient at any x."""
    log_p = F.logsigmoid(x)
    if not isinstance(q, Tensor):
        return -log_p if q < MIN_Q else F.elu(q * log_p) / -q
    q = q.detach().to(x.dtype)
    return _transform(log_p, torch.where((q >= 0) & (q <= 1), q, torch.nan))


def _transform(log_p: Tensor, q: Tensor, least: float = 0.0) -> Tensor:
    """``(1 − p^q)/q`` of q NaN or in [``least``, 1]."""
    # elu(y) is expm1(y) where y <= 0; its gradient is exp(y), that of expm1 is (result + 1), which cancels.
    if least >= MIN_Q:
        return F.elu(q * log_p) / -q
    # Both sides of `where` are differentiated, so neither may divide by zero, or multiply it by infinity.
    safe_q = q.clamp_min(MIN_Q)
    return torch.where(q < MIN_Q, -log_p, F.elu(safe_q * log_p) / -safe_q)


def _least_q(negative: Negative) -> float:
    return BOUNDS[negative.estimator][0] if negative.q is None else negative.q


def _q_of_negatives(negatives: Sequence[Negative], moments: Tensor, beta: float | Tensor) -> Tensor:
    """``[K]``, or ``[K, B]``: at once where all have one rule, as one negative has."""
    first = negatives[0]
    if all(n == first or replace(n, weight=first.weight) == first for n in negatives):
        return _q_of_negative(first, Moments(*moments), beta)
    return torch.stack([_q_of_negative(n, Moments(*moments[:, k]), beta) for k, n in enumerate(negatives)])


def _q_of_negative(negative: Negative, moments: Moments, beta: float | Tensor) -> Tensor:
    if negative.q is not None:
        return torch.full_like(moments.mean, negative.q)
    # The paper prints β inside the margin that q is read from; the released code does not run it so.
    alpha = negative.alpha * beta if negative.estimator == "paper" else negative.alpha
    return q_of(moments, negative.estimator, alpha, BOUNDS[negative.estimator])


def _fixed_weights(negatives: Sequence[Negative], margins: Tensor) -> Tensor:
    """``[K]``, made where the margins are, without a copy from the host that a GPU would wait for."""
    if all(n.weight == negatives[0].weight for n in negatives):
        return torch.full_like(margins, negatives[0].weight)
    return torch.stack([torch.full_like(margins[k], n.weight) for k, n in enumerate(negatives)])


def log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    """``log π − log π_ref``, in float32 at least; no gradient flows into the reference."""
    return upcast(policy) if reference is None else upcast(policy) - upcast(reference.detach())
