"""How noisy a batch looks: from margins to their moments, and from those to the robustness q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.checks import check_group, check_positive
from napo_loss.objective.checks import check_bounds, check_margin, check_mean, check_pair_mask, checked_previous
from napo_loss.parallel.reductions import mean_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALPHA = 0.01
"""The paper prints it, and the released code runs it, for margins of sums."""

BOUNDS = {"released": (0.001, 1.0), "paper": (0.01, 1.0), "moment": (0.001, 1.0)}
"""Smallest and largest q of each estimator: the released code runs the first, the paper prints the second; ours."""


class Moments(NamedTuple):
    """What q is read from, detached: of the margins ψ (no β) their mean, nats, and their mean square, nats².

    Scalars for margins ``[B]``, ``[K]`` for ``[K, B]``.
    """

    mean: Tensor
    square: Tensor


class BatchMoments(NamedTuple):
    """What q and dynamic weights of a whole batch are read from, however it is split into micro-batches; detached.

    From :meth:`napo_loss.NaPOLoss.batch_moments`. ``[K]`` for K negatives, scalars for one.
    """

    mean: Tensor
    """Mean of the margins behind q, nats, smoothed over steps where the recipe says so."""
    square: Tensor
    """Their mean square, nats², likewise."""
    margin: Tensor
    """Mean of the margins that the loss reads, nats, never smoothed: dynamic weights are shares of these."""


def margin_moments(
    margin: Tensor,
    *,
    q_from: Literal["rank_means", "all_pairs", "each_pair"] = "rank_means",
    process_group: ProcessGroup | None = None,
    previous: Moments | Tensor | None = None,
    decay: float = 0.0,
    pair_mask: Tensor | None = None,
) -> Moments:
    r"""Mean and mean square of margins, over the ranks of a process group and smoothed over steps where that is asked.

    ``moment = decay·previous + (1 − decay)·mean``. Moments may be averaged and q may not, which is not linear in them:
    smoothing and ranks come before :func:`noise_level`.

    Args:
        margin: margins ψ (no β) in nats, ``[B]``, or ``[K, B]`` for K negatives. Detached here.
        q_from: what is averaged. ``"rank_means"``: the mean over ranks of each rank's mean, as the released code runs;
            ``"all_pairs"``: the mean over all pairs of all ranks, right for ragged batches; ``"each_pair"``: each
            pair's own margin (no communication).
        process_group: ranks to average over (``torch.distributed.group.WORLD`` for all; None, and so this process
            alone, before ``init_process_group``). ``None``: this process alone; there is no hidden communication.
            A rank without pairs (``[0]`` or ``[K, 0]``) takes part and changes nothing.
        previous: the moments of the step before, to smooth with; ``None`` at the first step.
        decay: share of ``previous`` that is kept, in [0, 1).
        pair_mask: True for pairs that count, bool, ``[B]`` or shaped as ``margin``; the others may hold anything. Of no
            pair at all the moments are 0.

    Returns:
        :class:`Moments`: scalars for ``[B]``, ``[K]`` for ``[K, B]``, or shaped as ``margin`` with ``"each_pair"``.

    Raises:
        ValueError: on an empty margin without a process group, more than two dimensions, a decay out of range,
            ``previous`` or ``pair_mask`` of another shape, a process group that this process is not in.
        TypeError: where ``margin`` is not a floating-point tensor, or ``pair_mask`` not bool.

    Example:
        >>> import torch
        >>> from napo_loss import margin_moments, noise_level
        >>> step = margin_moments(torch.tensor([3.0, -1.0]))
        >>> step
        Moments(mean=tensor(1.), square=tensor(5.))
        >>> step = margin_moments(torch.tensor([4.0, 2.0]), previous=step, decay=0.5)
        >>> noise_level(step, estimator="moment")
        tensor(0.2697)
    """
    check_group("process_group", process_group)
    check_margin(margin, may_be_empty=process_group is not None)
    check_mean(q_from, decay)
    psi, count = upcast(margin.detach()), margin.shape[-1]
    if pair_mask is not None:
        check_pair_mask("pair_mask", pair_mask, "margin", margin, margin.shape[-1:])
        pair_mask = pair_mask.expand(psi.shape)
        psi, count = torch.where(pair_mask, psi, 0.0), pair_mask.sum(-1)
    moments = torch.stack([psi, psi * psi])  # [2, …, B]
    if q_from != "each_pair":
        moments = mean_over_group(
            mean_of_counted(moments, count), count, by_count=q_from == "all_pairs", process_group=process_group
        )
    if previous is not None:
        previous = checked_previous("previous", previous, moments.shape)
    return Moments(*smooth(moments, previous, decay))


def noise_level(
    margin: Tensor | Moments,
    *,
    estimator: Literal["released", "paper", "moment"] = "released",
    alpha: float | None = None,
    bounds: tuple[float, float] | None = None,
    q_from: Literal["rank_means", "all_pairs", "each_pair"] = "rank_means",
    process_group: ProcessGroup | None = None,
    pair_mask: Tensor | None = None,
) -> Tensor:
    r"""How noisy the batch looks, as the robustness q of :func:`noise_aware_dpo_loss`.

    ========== =============================== ============== ===================================================
    estimator  q                               within         reads
    ========== =============================== ============== ===================================================
    released   ``2·(1 − σ(α·m̄))``              [0.001, 1]     progress: 1 while nothing is learned, then falls
    paper      ``1 − σ(α·m̄)``                  [0.01, 1]      the same from 0.5; there ψ has β inside: ``β·margin``
    moment     ``1 − m̄ / √(mean ψ²)``          [0.001, 1]     2ε where a share ε of equal margins is flipped
    ========== =============================== ============== ===================================================

    with m̄ the mean of the margins. ``moment`` has no α and no scale: it does not change when all margins double.

    Args:
        margin: margins ψ in nats, ``[B]``, or ``[K, B]`` for K negatives; sums or per-token means, whichever ``alpha``
            was chosen for (the paper prints 0.01 for sums, 0.5 for means). Detached here. Or their
            :class:`Moments`, from :func:`margin_moments`, which smooths them over steps, or ``Moments(*out.moments)``
            of a :class:`napo_loss.NaPOOutput`.
        estimator: the rule, see above.
        alpha: slope α > 0. Default: 0.01. ``"moment"`` has none.
        bounds: smallest and largest q, within [0, 1]. Default: those of the estimator.
        q_from: what m̄ is, see :func:`margin_moments`.
        process_group: ranks to average over, see :func:`margin_moments`.
        pair_mask: the pairs that count, see :func:`margin_moments`.

    Returns:
        q, detached: a scalar for ``[B]``, ``[K]`` for ``[K, B]``, or shaped as ``margin`` with ``"each_pair"``.

    Raises:
        ValueError: on an empty margin without a process group, more than two dimensions, an unknown estimator, α ≤ 0 or
            an α for ``"moment"``, ``q_from``, a process group or a mask beside moments, bounds out of range,
            ``"moment"`` of each pair, a process group that this process is not in.
        TypeError: where ``margin`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from napo_loss import noise_level
        >>> noise_level(torch.zeros(4))  # step 0: most robust
        tensor(1.)
        >>> noise_level(torch.tensor([[100.0, 300.0], [0.0, 20.0]]))  # two negatives
        tensor([0.2384, 0.9500])
        >>> noise_level(torch.tensor([8.0, 8.0, 8.0, -8.0]), estimator="moment")  # a quarter flipped
        tensor(0.5000)

    Source:
        ``released``: the released code of arXiv:2503.17928; ``paper``: its Eq. 2 and 12; ``moment``: ours. How they
        differ, and what neither can see: docs/method.md.
    """
    check_estimator(estimator, alpha, q_from)
    if bounds is not None:
        check_bounds(bounds)
    if isinstance(margin, Moments):
        if process_group is not None or q_from != "rank_means" or pair_mask is not None:
            raise ValueError(
                "margin is Moments, averaged already: give q_from, process_group and pair_mask to margin_moments"
            )
    else:
        margin = margin_moments(margin, q_from=q_from, process_group=process_group, pair_mask=pair_mask)
    return q_of(margin, estimator, ALPHA if alpha is None else alpha, bounds or BOUNDS[estimator])


def mean_of_counted(x: Tensor, count: int | Tensor) -> Tensor:
    """Over the pairs, the last axis, which where ``count`` is a tensor is 0 for those that do not count."""
    return x.sum(-1) / count.clamp_min(1) if isinstance(count, Tensor) else x.mean(-1)


def check_estimator(estimator: str, alpha: float | None, q_from: str) -> None:
    if estimator not in BOUNDS:
        raise ValueError(f"estimator must be one of {tuple(BOUNDS)}, got {estimator!r}")
    if alpha is not None:
        check_positive("alpha", alpha)
        if estimator == "moment":
            raise ValueError(f"estimator='moment' has no slope, got alpha = {alpha}: it has no scale to choose")
    if estimator == "moment" and q_from == "each_pair":
        raise ValueError("estimator='moment' compares the pairs of a batch: q_from='each_pair' leaves it one pair")


def q_of(moments: Moments, estimator: str, alpha: float | Tensor, bounds: tuple[float, float]) -> Tensor:
    if estimator == "moment":
        rms = moments.square.sqrt()
        # 1 where every margin is 0, and where one is infinite: beside it the others say nothing.
        q = 1 - torch.where(rms.isinf(), 0.0, moments.mean / torch.where(rms == 0, 1.0, rms))
    else:
        q = (2 if estimator == "released" else 1) * torch.sigmoid(-alpha * moments.mean)
    return q.clamp(*bounds)


def smooth(moments: Tensor, previous: Tensor | None, decay: float) -> Tensor:
    """An infinite or NaN history is none, or a single pair that the policy excludes would stay in all later q."""
    if previous is None:
        return moments
    return decay * torch.where(previous.isfinite(), previous, moments) + (1 - decay) * moments


def likely_swapped(margin: Tensor, count: int) -> Tensor:
    r"""The pairs that the policy contradicts most, those of the smallest margins: which labels to look at again.

    In our study 0.6 of them were swapped where 0.3 of all pairs were, after one or two epochs; later the policy has
    memorised what is wrong with them.

    Args:
        margin: margins ψ in nats, ``[B]``, or ``[K, B]`` for K negatives; of all pairs rather than of a batch.
        count: how many pairs.

    Returns:
        Their indices, ``[count]`` or ``[K, count]``, int64, the most contradicted first. NaN comes last.

    Raises:
        ValueError: on an empty margin, more than two dimensions, or a count that is not in [1, B].
        TypeError: where ``margin`` is not a floating-point tensor.

    Example:
        >>> import torch
        >>> from napo_loss import likely_swapped
        >>> likely_swapped(torch.tensor([3.0, -4.0, 0.5, -1.0]), 2)
        tensor([1, 3])

    Source:
        Ours; measured in docs/noise_study.md.
    """
    check_margin(margin)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= margin.shape[-1]:
        raise ValueError(f"count must be a whole number in [1, B] = [1, {margin.shape[-1]}], got {count!r}")
    return margin.detach().topk(count, largest=False).indices
