"""From sequence log-probs to losses: the noise level q, the loss L_q, several negatives.

    ψ   = (log π(y_w) − log π(y_l)) − (log π_ref(y_w) − log π_ref(y_l))     margin, nats
    q   = clamp(2·(1 − σ(α·m̄)), 0.001, 1)                                  m̄: mean margin, detached
    L_q = (1 − σ(βψ)^q) / q                                                q → 0: DPO; q = 1: MAE

Source: Debiasing Multimodal Large Language Models via Noise-Aware Preference Optimization (CVPR 2025),
arXiv:2503.17928.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from napo_loss.backend import HAS_TRITON
from napo_loss.checks import check_group, check_logps, check_positive, check_q
from napo_loss.objective import ops
from napo_loss.objective.eager import box_cox, combine, log_ratio
from napo_loss.objective.negatives import Group, Logps, flat_settings, pack, row_per_negative
from napo_loss.objective.recipes import Recipe
from napo_loss.parallel.reductions import mean_over_group
from napo_loss.types import NaPOLoss, PreferenceLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def noise_aware_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    q: float | Tensor,
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
        beta: strength β > 0 of the pull to the reference.
        q: robustness in [0, 1], a float or a tensor that broadcasts to the margin: scalar, ``[B]``,
            ``[K, 1]`` (one per negative) or ``[K, B]``. No gradient flows into it. A tensor's values
            are not read back to check them: outside [0, 1] the loss is NaN.

    Returns:
        ``losses`` shaped as the rejected log-probs, ``chosen_rewards [B]``, ``rejected_rewards``.

    Raises:
        ValueError: on mismatched shapes or devices, an empty batch, β ≤ 0 or a float q outside [0, 1].
        TypeError: where an argument is not a floating-point tensor.

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
    check_positive("beta", beta)
    check_logps(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen = log_ratio(policy_chosen_logps, reference_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, reference_rejected_logps)
    check_q(q, rejected)
    losses = box_cox(beta * (chosen - rejected), q)
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def napo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps | Mapping[str, Logps],
    reference_chosen_logps: Logps | None,
    reference_rejected_logps: Logps | Mapping[str, Logps] | None,
    *,
    beta: float = 0.1,
    recipe: Recipe | None = None,
    previous_q: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> NaPOLoss:
    r"""Noise-Aware Preference Optimization: estimates q from the batch and applies the loss.

    ``loss_b = Σ_k weight_k · L_{q_k}(β·ψ_kb) − sft_weight · log π(y_w,b)``, with one ``q_k`` per kind of
    negative from :func:`noise_level` and :func:`noise_aware_dpo_loss` as the loss. The positional order and
    the triple are those of the DPO hooks of TRL, LLaMA-Factory, OpenRLHF, ms-swift and muffin.

    Args:
        policy_chosen_logps: ``log π(y_w)`` in nats, ``[B]``, or a :class:`SequenceLogps`, whose lengths are
            needed where the recipe reads per-token means.
        policy_rejected_logps: one negative per chosen, ``[B]``; several, ``[K, B]``; or a mapping from the
            name of the negative (``"rejected"``, ``"question_only"``, ``"image_only"``, any name) to ``[B]``.
        reference_chosen_logps: ``log π_ref(y_w)``, ``[B]``; ``None`` (both) for a reference-free loss.
        reference_rejected_logps: as ``policy_rejected_logps``; a mapping has the same names.
        beta: strength β > 0.
        recipe: the other settings, see :class:`Recipe`. Default: the published values.
        previous_q: the ``.q`` of the step before, where ``recipe.decay > 0`` smooths q.
        process_group: ranks over which mean margins are averaged (see :func:`noise_level`), in one all-reduce for all
            negatives and weights together. A rank without pairs takes part with ``[0]`` and ``[K, 0]``; its losses
            are empty, so add them up instead of averaging (docs/scale.md).

    Returns:
        ``losses [B]`` (weighted over negatives), ``chosen_rewards [B]``, ``rejected_rewards`` (``[B]``, or
        ``[K, B]`` with the rows in the order given): unpacks as three. ``.q`` and ``.weights`` (``[K]``;
        scalars for one ``[B]`` negative) ride along for logging.

    Raises:
        ValueError: on mismatched shapes, names or devices, an empty batch, β ≤ 0, missing lengths.
        TypeError: where an argument is not a floating-point tensor.

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

    Note:
        On a GPU with Triton: one launch forward (two around the all-reduce of a process group), one backward,
        no host sync. A mapping of separate tensors costs one more launch, to stack them.

    Source:
        arXiv:2503.17928 and its published code (β, α, weights, bounds, the SFT term).
    """
    check_positive("beta", beta)
    check_group("process_group", process_group)
    recipe = recipe or Recipe()
    group = pack(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, recipe,
        may_be_empty=process_group is not None,
    )  # fmt: skip
    previous = row_per_negative(previous_q, group)
    objective = _fused if _can_fuse(group, recipe) else combine
    losses, chosen_rewards, rejected_rewards, q, weights = objective(group, beta, recipe, previous, process_group)
    if not group.stacked:
        rejected_rewards, q, weights = rejected_rewards[0], q[0], weights[0]
    return NaPOLoss(losses, chosen_rewards, rejected_rewards, q, weights)


def _can_fuse(group: Group, recipe: Recipe) -> bool:
    """Whether the objective kernel does: a GPU with Triton, float32 or less, one q per kind of negative."""
    x = group.policy_chosen
    return x.is_cuda and x.dtype != torch.float64 and recipe.reduction != "none" and HAS_TRITON


def _fused(
    group: Group, beta: float, recipe: Recipe, previous_q: Tensor | None, process_group: ProcessGroup | None
) -> tuple[Tensor, ...]:
    """:func:`napo_loss.formulas.combine` in one launch, or in two around the all-reduce."""
    logps, settings, means = group[:6], flat_settings(group.negatives), None
    scalars = [float(beta), float(recipe.sft_weight), float(recipe.decay)]
    average, dynamic = recipe.average_logps, recipe.weights == "dynamic"
    if process_group is not None:
        with torch.no_grad():
            means = ops.objective_means(*logps, settings, scalars, average)
        B, by_count = logps[1].shape[1], recipe.reduction == "mean"
        means = mean_over_group(means, B, by_count=by_count, process_group=process_group)
    losses, *rest = ops.objective(*logps, previous_q, means, settings, scalars, average, dynamic)
    return losses, *(x.detach() for x in rest[:4])
