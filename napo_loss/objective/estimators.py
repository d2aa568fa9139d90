"""How noisy a batch looks: from margins to the robustness q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.checks import check_group, check_positive
from napo_loss.objective.checks import check_estimator, check_margin
from napo_loss.parallel.reductions import mean_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Q_BOUNDS = (0.001, 1.0)
"""The range of q that the released code runs; the paper prints [0.01, 1]."""


def noise_level(
    margin: Tensor,
    *,
    alpha: float = 0.01,
    bounds: tuple[float, float] = Q_BOUNDS,
    q_from: Literal["rank_means", "all_pairs", "each_pair"] = "rank_means",
    process_group: ProcessGroup | None = None,
    previous: float | Tensor | None = None,
    decay: float = 0.0,
) -> Tensor:
    r"""How noisy the batch looks, as the robustness q of :func:`noise_aware_dpo_loss`.

    ``q = clamp(2·(1 − σ(α·m̄)), *bounds)`` with m̄ the mean of ``margin``. At the start of training the margin
    is 0 and q is 1, the most robust; as the policy learns to tell the pairs apart q falls towards DPO.

    Args:
        margin: unscaled margins ψ (no β) in nats, ``[B]``, or ``[K, B]`` for K negatives; sums or per-token
            means, whichever ``alpha`` was chosen for (the paper prints 0.01 for sums, 0.5 for means). Detached here.
        alpha: slope α > 0.
        bounds: smallest and largest q, within [0, 1].
        q_from: what m̄ is. ``"rank_means"``: the mean over ranks of each rank's mean, as the released code runs;
            ``"all_pairs"``: the mean over all pairs of all ranks, right for ragged batches; ``"each_pair"``: each
            pair's own margin (no communication).
        process_group: ranks to average over (``torch.distributed.group.WORLD`` for all; None, and so this process
            alone, before ``init_process_group``). ``None``: this process alone; there is no hidden communication.
            A rank without pairs (``[0]`` or ``[K, 0]``) takes part and changes nothing.
        previous: the q of the step before, to smooth with; ``None`` at the first step.
        decay: share of ``previous`` that is kept: ``decay·previous + (1 − decay)·q``, in [0, 1).

    Returns:
        q, detached: a scalar for ``[B]``, ``[K]`` for ``[K, B]``, or shaped as ``margin`` with ``"each_pair"``.

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
        The released code of arXiv:2503.17928; the paper prints ``1 − σ(α·m̄)`` with β inside m̄. How q moves in
        training, with batch size and accumulation: docs/choosing.md.
    """
    check_group("process_group", process_group)
    check_margin(margin, may_be_empty=process_group is not None)
    check_positive("alpha", alpha)
    check_estimator(bounds, q_from, decay)
    margin = upcast(margin.detach())
    if q_from != "each_pair":
        B, by_count = margin.shape[-1], q_from == "all_pairs"
        margin = mean_over_group(margin.mean(-1), B, by_count=by_count, process_group=process_group)
    return smooth(q_of(margin, alpha, bounds), previous, decay)


def q_of(margin: Tensor, alpha: float, bounds: tuple[float, float]) -> Tensor:
    return (2 * torch.sigmoid(-alpha * margin)).clamp(*bounds)


def smooth(q: Tensor, previous: float | Tensor | None, decay: float) -> Tensor:
    return q if previous is None else decay * previous + (1 - decay) * q
