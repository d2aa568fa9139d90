"""How noisy a batch looks: from margins to the robustness q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.checks import check_estimator, check_group, check_margin, check_positive
from napo_loss.parallel.reductions import mean_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Q_BOUNDS = (0.001, 1.0)
"""The published range of q."""


def noise_level(
    margin: Tensor,
    *,
    alpha: float = 0.01,
    bounds: tuple[float, float] = Q_BOUNDS,
    reduction: Literal["rank_mean", "mean", "none"] = "rank_mean",
    process_group: ProcessGroup | None = None,
    previous: float | Tensor | None = None,
    decay: float = 0.0,
) -> Tensor:
    r"""How noisy the batch looks, as the robustness q of :func:`noise_aware_dpo_loss`.

    ``q = clamp(2·(1 − σ(α·m̄)), *bounds)`` with m̄ the mean of ``margin``. At the start of training the margin
    is 0 and q is 1, the most robust; as the policy learns to tell the pairs apart q falls towards DPO.

    With few samples q is itself noise, and because it is not linear in the margin, the q of a batch is not
    the mean of the q of its micro-batches: **gradient accumulation changes it**. Either estimate q once from
    the margins of the whole accumulated batch and hand it to :func:`noise_aware_dpo_loss`, or smooth it over
    steps with ``previous`` and ``decay``.

    Args:
        margin: unscaled margins ψ (no β) in nats, ``[B]``, or ``[K, B]`` for K negatives; sums or per-token
            means, whichever ``alpha`` was chosen for (published: 0.01 for sums, 0.5 for means). Detached here.
        alpha: slope α > 0.
        bounds: smallest and largest q, within [0, 1].
        reduction: what m̄ is. ``"rank_mean"``: the mean over ranks of each rank's mean, as published;
            ``"mean"``: the mean over all samples of all ranks, right for ragged batches; ``"none"``: each
            sample's own margin (no communication).
        process_group: ranks to average over (``torch.distributed.group.WORLD`` for all; None, and so this process
            alone, before ``init_process_group``). ``None``: this process alone; there is no hidden communication.
            All negatives share one all-reduce. A rank without pairs (``[0]`` or ``[K, 0]``) takes part in it and
            changes nothing.
        previous: the q of the step before, to smooth with; ``None`` at the first step.
        decay: share of ``previous`` that is kept: ``decay·previous + (1 − decay)·q``, in [0, 1).

    Returns:
        q, detached: a scalar for ``[B]``, ``[K]`` for ``[K, B]``, or shaped as ``margin`` with ``"none"``.

    Raises:
        ValueError: on an empty margin without a process group, more than two dimensions, α ≤ 0, bounds or decay out
            of range, a process group that this process is not in.
        TypeError: where ``margin`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from napo_loss import noise_level
        >>> noise_level(torch.zeros(4))  # step 0: most robust
        tensor(1.)
        >>> noise_level(torch.tensor([[100.0, 300.0], [0.0, 20.0]]))  # two negatives
        tensor([0.2384, 0.9500])

    Source:
        arXiv:2503.17928 and its published code.
    """
    check_group("process_group", process_group)
    check_margin(margin, may_be_empty=process_group is not None)
    check_positive("alpha", alpha)
    check_estimator(bounds, reduction, decay)
    margin = upcast(margin.detach())
    if reduction != "none":
        B, by_count = margin.shape[-1], reduction == "mean"
        margin = mean_over_group(margin.mean(-1), B, by_count=by_count, process_group=process_group)
    return smooth(q_of(margin, alpha, bounds), previous, decay)


def q_of(margin: Tensor, alpha: float, bounds: tuple[float, float]) -> Tensor:
    return (2 * torch.sigmoid(-alpha * margin)).clamp(*bounds)


def smooth(q: Tensor, previous: float | Tensor | None, decay: float) -> Tensor:
    return q if previous is None else decay * previous + (1 - decay) * q
