"""From sequence log-probs to losses: the loss L_q, alone and with the noise level and several negatives.

    ψ   = (log π(y_w) − log π(y_l)) − (log π_ref(y_w) − log π_ref(y_l))     margin, nats
    q   = clamp(2·(1 − σ(α·m̄)), 0.001, 1)                                  m̄: mean margin, detached
    L_q = (1 − σ(βψ)^q) / q                                                q → 0: DPO; q = 1: MAE

Source: Debiasing Multimodal Large Language Models via Noise-Aware Preference Optimization (CVPR 2025),
arXiv:2503.17928; q as its released code runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from napo_loss.backend import HAS_TRITON
from napo_loss.checks import check_group
from napo_loss.objective import eager, ops
from napo_loss.objective.checks import check_logps, check_pair_mask, check_q, checked_beta
from napo_loss.objective.estimators import Moments, smooth
from napo_loss.objective.negatives import Logps, PreferenceBatch
from napo_loss.objective.recipes import Recipe, misplaced
from napo_loss.parallel.reductions import mean_over_group
from napo_loss.types import NaPOOutput, PreferenceLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT = Recipe()  # made, and checked, once


def noise_aware_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float | Tensor = 0.1,
    q: float | Tensor,
    pair_mask: Tensor | None = None,
) -> PreferenceLoss:
    r"""DPO with robustness ``q``: the negative Box–Cox transform of the preference probability.

    ``L_q = (1 − σ(βψ)^q) / q``. ``q = 0`` is exactly DPO, ``−log σ(βψ)``; ``q = 1`` is the mean absolute
    error ``1 − σ(βψ)``. Its gradient is the DPO gradient times ``σ(βψ)^q``: pairs the policy contradicts
    (often mislabelled ones) pull less the larger q is.

    Args:
        policy_chosen_logps: ``log π(y_w)`` in nats, ``[B]``; any floating dtype, computed in float32
            (float64 stays float64).
        policy_rejected_logps: ``log π(y_l)``, ``[B]``, or ``[K, B]`` for K negatives per chosen.
        reference_chosen_logps: ``log π_ref(y_w)``, ``[B]``; ``None`` (both) for a reference-free loss.
        reference_rejected_logps: ``log π_ref(y_l)``, shaped as the policy's.
        beta: strength β > 0 of the pull to the reference, a number or a 0-d tensor.
        q: robustness in [0, 1], a float or a tensor that broadcasts to the margin: scalar, ``[B]``,
            ``[K, 1]`` (one per negative) or ``[K, B]``. No gradient flows into it. A tensor's values
            are not read back to check them: outside [0, 1] the loss is NaN.
        pair_mask: True for pairs that count, bool, ``[B]`` or shaped as the rejected. The others may hold anything:
            their losses, rewards and gradients are 0.

    Returns:
        ``losses`` shaped as the rejected log-probs, ``chosen_rewards [B]``, ``rejected_rewards``.

    Raises:
        ValueError: on mismatched shapes or devices, an empty batch, β ≤ 0 or a float q outside [0, 1].
        TypeError: where an argument is not a floating-point tensor, or ``pair_mask`` not bool.

    Example:
        >>> import torch
        >>> from napo_loss import noise_aware_dpo_loss
        >>> chosen, rejected = torch.tensor([-10.0, -12.0]), torch.tensor([-14.0, -11.0])
        >>> ref = torch.tensor([-11.0, -11.0])
        >>> losses, *_ = noise_aware_dpo_loss(chosen, rejected, ref, ref, beta=0.1, q=0.0)
        >>> losses  # DPO itself
        tensor([0.5130, 0.7444])
        >>> noise_aware_dpo_loss(chosen, rejected, ref, ref, beta=0.1, q=1.0).losses  # 1 − p
        tensor([0.4013, 0.5250])

    Source:
        arXiv:2503.17928; the transform as a loss: arXiv:1805.07836 (generalized cross entropy).
    """
    beta = checked_beta(beta)
    check_logps(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen = eager.log_ratio(policy_chosen_logps, reference_chosen_logps)
    rejected = eager.log_ratio(policy_rejected_logps, reference_rejected_logps)
    check_q(q, rejected)
    if pair_mask is not None:
        check_pair_mask("pair_mask", pair_mask, "policy_rejected_logps", rejected, chosen.shape)
        pair_mask = pair_mask.expand(rejected.shape)
        any_mask = pair_mask.any(0) if pair_mask.dim() == 2 else pair_mask
        chosen, rejected = torch.where(any_mask, chosen, 0.0), torch.where(pair_mask, rejected, 0.0)
    losses = eager.box_cox(beta * eager.where(pair_mask, chosen - rejected), q)
    losses = eager.where(pair_mask, losses)
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def napo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps | Mapping[str, Logps],
    reference_chosen_logps: Logps | None,
    reference_rejected_logps: Logps | Mapping[str, Logps] | None,
    *,
    beta: float | Tensor = 0.1,
    recipe: Recipe | None = None,
    previous_moments: Moments | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    **misplaced_settings: object,
) -> NaPOOutput:
    r"""Noise-Aware Preference Optimization: estimates q from the batch and applies the loss.

    ``loss_b = Σ_k weight_k · L_{q_k}(β·ψ_kb) − sft_weight · log π(y_w,b)``, with one ``q_k`` per kind of
    negative from :func:`noise_level` and :func:`noise_aware_dpo_loss` as the loss. The positional order and
    the triple are those of the DPO hooks of TRL, LLaMA-Factory, OpenRLHF, ms-swift and muffin.

    Args:
        policy_chosen_logps: ``log π(y_w)`` in nats, ``[B]``, or a :class:`SequenceLogps`, whose lengths are
            needed where the recipe reads per-token means, or a :class:`MaskedLogps`, whose mask says which pairs are
            padding. So may the others.
        policy_rejected_logps: one negative per chosen, ``[B]``; several, ``[K, B]``; or a mapping from the
            name of the negative (``"rejected"``, ``"question_only"``, ``"image_only"``, any name) to ``[B]``.
        reference_chosen_logps: ``log π_ref(y_w)``, ``[B]``; ``None`` (both) for a reference-free loss.
        reference_rejected_logps: as ``policy_rejected_logps``; a mapping has the same names.
        beta: strength β > 0, a number or a 0-d tensor.
        recipe: the other settings, see :class:`Recipe`, which also says the defaults.
        previous_moments: the ``.moments`` of the step before (or what :func:`margin_moments` returned), where
            ``recipe.decay > 0`` smooths them.
        process_group: ranks over which mean margins are averaged, see :func:`noise_level`. A rank without pairs takes
            part with ``[0]`` and ``[K, 0]``.

    Returns:
        :class:`NaPOOutput`: ``losses [B]`` (weighted over negatives), ``chosen_rewards [B]``, ``rejected_rewards``
        (``[B]``, or ``[K, B]`` with the rows in the order given); unpacks as these three, and carries ``.q`` and
        ``.weights`` for logging.

    Raises:
        ValueError: on mismatched shapes, names or devices, an empty batch, β ≤ 0, missing lengths.
        TypeError: where an argument is not a floating-point tensor, and for settings that belong in the recipe.

    Example:
        >>> import torch
        >>> from napo_loss import napo_loss
        >>> chosen = torch.tensor([-10.0, -12.0], requires_grad=True)
        >>> rejected = torch.tensor([-60.0, -11.0], requires_grad=True)
        >>> ref_chosen, ref_rejected = torch.tensor([-11.0, -11.0]), torch.tensor([-20.0, -11.0])
        >>> out = napo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
        >>> losses, chosen_rewards, rejected_rewards = out
        >>> losses.mean().backward()
        >>> chosen_rewards
        tensor([ 0.1000, -0.1000])
        >>> out.q  # mean margin 20 nats: nearly the most robust
        tensor(0.9003)

    Source:
        arXiv:2503.17928 and its released code, constant by constant in docs/method.md.
    """
    if misplaced_settings:
        raise misplaced("napo_loss", misplaced_settings)
    beta = checked_beta(beta)
    check_group("process_group", process_group)
    recipe = recipe or DEFAULT
    batch = PreferenceBatch.of(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, recipe,
        may_be_empty=process_group is not None,
    )  # fmt: skip
    previous = batch.previous(previous_moments, each_pair=recipe.q_from == "each_pair")
    return loss_of(batch, beta, recipe, previous, process_group)


def loss_of(
    batch: PreferenceBatch,
    beta: float | Tensor,
    recipe: Recipe,
    previous: Tensor | None,  # [2, K]
    process_group: ProcessGroup | None,
    means: Tensor | None = None,  # [3, K], see batch_means: then nothing is reduced or smoothed here
) -> NaPOOutput:
    """The loss of checked arguments, from the kernel or in tensor operations."""
    if not isinstance(beta, Tensor) and _can_fuse(batch, recipe):
        out = _fused(batch, beta, recipe, previous, process_group, means)
    else:
        out = eager.objective(batch, beta, recipe, previous, process_group, means)
    if batch.stacked:
        return out
    return out._replace(
        rejected_rewards=out.rejected_rewards[0], q=out.q[0], weights=out.weights[0], moments=out.moments[:, 0]
    )


@torch.no_grad()
def batch_means(
    batch: PreferenceBatch, recipe: Recipe, previous: Tensor | None, process_group: ProcessGroup | None
) -> Tensor:
    """``[3, K]``: what q (mean, mean square; smoothed) and dynamic weights (mean ψ) are read from, over all ranks."""
    if _can_fuse(batch, recipe):
        means = ops.objective_means(**ops.ObjectiveCall.of(batch, 1.0, recipe).to_schema())  # of ψ, without β
    else:
        margins = eager.margins_of(batch)
        means = eager.means_of(margins.psi, margins.seen, batch.logps.pairs())
    by_count = recipe.q_from == "all_pairs"
    means = mean_over_group(means, batch.logps.pairs(), by_count=by_count, process_group=process_group)
    return torch.cat([smooth(means[:2], previous, recipe.decay), means[2:]])


def _can_fuse(batch: PreferenceBatch, recipe: Recipe) -> bool:
    """Whether the objective kernel does: a GPU with Triton, float32 or less, one q per kind of negative."""
    x = batch.logps.policy_chosen
    return x.is_cuda and x.dtype != torch.float64 and recipe.q_from != "each_pair" and HAS_TRITON


def _fused(
    batch: PreferenceBatch,
    beta: float,
    recipe: Recipe,
    previous_moments: Tensor | None,  # [2, K]
    process_group: ProcessGroup | None,
    means: Tensor | None,  # [3, K]
) -> NaPOOutput:
    """:func:`napo_loss.objective.eager.objective` in one launch, or in two around the all-reduce."""
    call = ops.ObjectiveCall.of(batch, beta, recipe, previous_moments)
    if means is not None:
        call = call.with_means(means.to(torch.float32))
    elif process_group is not None:
        with torch.no_grad():
            own = ops.objective_means(**call.to_schema())
        count, by_count = batch.logps.pairs(), recipe.q_from == "all_pairs"
        call = call.with_means(mean_over_group(own, count, by_count=by_count, process_group=process_group))
    out = ops.Objective(*ops.objective(**call.to_schema()))
    rewards, found = out.rewards.detach(), out.found.detach()
    return NaPOOutput(
        losses=out.losses, chosen_rewards=rewards[0], rejected_rewards=rewards[1:], q=found[0], weights=found[1],
        moments=found[2:],
    )  # fmt: skip
