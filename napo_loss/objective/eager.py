"""The objective in plain tensor operations, the twin of its kernel: float32 at least, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.objective.estimators import Q_BOUNDS, q_of, smooth
from napo_loss.objective.negatives import PreferenceBatch
from napo_loss.objective.recipes import Negative, Recipe
from napo_loss.parallel.reductions import mean_over_group
from napo_loss.types import MIN_LENGTH, NaPOOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_Q = 1e-30
"""Below this q·log p may be a float32 denormal; L_q there equals DPO to the last bit."""

WEIGHT_FLOOR = 0.01
"""The smallest share a negative keeps under dynamic weights."""


def objective(
    batch: PreferenceBatch,
    beta: float | Tensor,
    recipe: Recipe,
    previous_q: Tensor | None,  # [K] or [K, B]
    process_group: ProcessGroup | None,
) -> NaPOOutput:
    """The objective in plain tensor operations, differentiable any number of times."""
    logps, negatives = batch.logps, list(enumerate(batch.negatives))
    chosen = log_ratio(logps.policy_chosen, logps.reference_chosen)  # [B]
    rejected = log_ratio(logps.policy_rejected, logps.reference_rejected)  # [K, B]
    sft = recipe.sft_weight * upcast(logps.policy_chosen)
    margins = {"sum": chosen - rejected}
    if logps.chosen_length is not None and logps.rejected_length is not None:
        chosen_length = logps.chosen_length.clamp_min(MIN_LENGTH)
        rejected_length = logps.rejected_length.clamp_min(MIN_LENGTH)
        margins["mean"] = chosen / chosen_length - rejected / rejected_length
        if recipe.average_logps:
            chosen, rejected, sft = chosen / chosen_length, rejected / rejected_length, sft / chosen_length
    psi = margins["mean" if recipe.average_logps else "sum"]

    seen = torch.stack([margins[n.margin][k] if n.q is None else psi[k] for k, n in negatives])
    means = torch.stack([seen.mean(-1), beta * psi.mean(-1)]).detach()
    by_count = recipe.q_from == "all_pairs"
    seen_mean, reward_mean = mean_over_group(means, psi.shape[-1], by_count=by_count, process_group=process_group)
    estimate = seen.detach() if recipe.q_from == "each_pair" else seen_mean
    previous = [None] * len(negatives) if previous_q is None else previous_q
    q = torch.stack([_q_of_negative(n, estimate[k], previous[k], recipe.decay) for k, n in negatives])
    if recipe.weights == "dynamic":
        weights = dynamic_weights(reward_mean)
    else:
        weights = torch.stack([torch.full_like(reward_mean[k], n.weight) for k, n in negatives])
    losses = box_cox(beta * psi, q if q.dim() == 2 else q[:, None])
    losses = (weights[:, None] * losses).sum(0) - sft
    return NaPOOutput(losses, (beta * chosen).detach(), (beta * rejected).detach(), q, weights)


def dynamic_weights(reward_margins: Tensor) -> Tensor:
    """Each negative's share of the summed mean reward margins, floored at 0.01: the rule that the paper prints.

    That rule is undefined when the margins sum to 0 or less, and runs away when they nearly cancel. Here a
    negative margin counts as 0, which changes nothing while all are positive, and where none is positive the
    negatives share equally.

    Args:
        reward_margins: ``β·mean ψ`` of each negative, ``[K]``.
    """
    gain = reward_margins.clamp_min(0.0)
    total = gain.sum()
    share = gain / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, share, 1.0 / gain.numel()).clamp_min(WEIGHT_FLOOR)


def box_cox(x: Tensor, q: float | Tensor) -> Tensor:
    """``(1 − σ(x)^q)/q`` without its pitfalls: exact at q = 0, no overflow and no NaN gradient at any x."""
    log_p = F.logsigmoid(x)
    if not isinstance(q, Tensor):
        return -log_p if q < MIN_Q else -torch.expm1(q * log_p) / q
    q = q.detach().to(x.dtype)
    q = torch.where((q >= 0) & (q <= 1), q, torch.nan)
    # Both sides of `where` are differentiated, so neither may divide by zero.
    return torch.where(q < MIN_Q, -log_p, -torch.expm1(q * log_p) / torch.where(q < MIN_Q, 1.0, q))


def _q_of_negative(negative: Negative, margin: Tensor, previous: Tensor | None, decay: float) -> Tensor:
    if negative.q is not None:
        return torch.full_like(margin, negative.q)
    return smooth(q_of(margin, negative.alpha, Q_BOUNDS), previous, decay)


def log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    """``log π − log π_ref``, in float32 at least; no gradient flows into the reference."""
    return upcast(policy) if reference is None else upcast(policy) - upcast(reference.detach())
