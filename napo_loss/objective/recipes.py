"""Settings of the objective: how each kind of negative enters it, and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Negative:
    """How one kind of negative enters the objective.

    Attributes:
        alpha: slope α of the noise estimate ``q = 2·(1 − σ(α·m̄))``; larger: q falls sooner.
        margin: which margin the estimate reads: of the ``"sum"`` or of the per-token ``"mean"`` log-probs.
            The loss itself is not touched by this.
        q: a fixed robustness in [0, 1] instead of the estimate; ``q=0.0`` is plain DPO.
        weight: factor of this negative's loss when weights are fixed.
    """

    alpha: float = 0.01
    margin: Literal["sum", "mean"] = "sum"
    q: float | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"Negative.alpha must be > 0, got {self.alpha}")
        if self.margin not in ("sum", "mean"):
            raise ValueError(f"Negative.margin must be 'sum' or 'mean', got {self.margin!r}")
        if self.q is not None and not 0 <= self.q <= 1:
            raise ValueError(f"Negative.q must be None or in [0, 1], got {self.q}")
        if not self.weight >= 0:
            raise ValueError(f"Negative.weight must be >= 0, got {self.weight}")


PAPER_NEGATIVES: Mapping[str, Negative] = MappingProxyType(
    {
        "rejected": Negative(q=0.0, weight=0.04),
        "question_only": Negative(alpha=0.5, margin="mean", weight=0.48),
        "image_only": Negative(alpha=0.01, margin="sum", weight=0.48),
    }
)
"""The published group: plain DPO on ``rejected``, noise-aware terms against language and vision bias."""


@dataclass(frozen=True)
class Recipe:
    """Everything about the objective that is not a log-prob, β or a process group.

    Attributes:
        negatives: one :class:`Negative` for all, or a mapping from the name of a negative to its settings
            (with stacked ``[K, B]`` log-probs: in the order of the rows); the names must be the same as in the
            log-probs. Default: :data:`PAPER_NEGATIVES` for the paper's three names; for any other set its
            settings by name, ``Negative()`` for names it lacks, unnamed rows and a lone ``"rejected"``, each
            with weight ``1/K``.
        weights: ``"fixed"``: ``Negative.weight``; ``"dynamic"``: each negative's share of the summed mean
            reward margins.
        average_logps: the loss reads per-token mean log-probs instead of sums.
        sft_weight: adds ``−sft_weight·log π(y_w)`` to each loss, as the published trainer can.
        reduction: how the mean margin behind q is formed, see :func:`napo_loss.noise_level`.
        decay: share of the previous q that is kept, see :func:`napo_loss.noise_level`.
    """

    negatives: Negative | Mapping[str, Negative] | None = field(default=None, hash=False)
    weights: Literal["fixed", "dynamic"] = "fixed"
    average_logps: bool = False
    sft_weight: float = 0.0
    reduction: Literal["rank_mean", "mean", "none"] = "rank_mean"
    decay: float = 0.0

    def __post_init__(self):
        if self.weights not in ("fixed", "dynamic"):
            raise ValueError(f"Recipe.weights must be 'fixed' or 'dynamic', got {self.weights!r}")
        if self.reduction not in ("rank_mean", "mean", "none"):
            raise ValueError(f"Recipe.reduction must be 'rank_mean', 'mean' or 'none', got {self.reduction!r}")
        if not self.sft_weight >= 0:
            raise ValueError(f"Recipe.sft_weight must be >= 0, got {self.sft_weight}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"Recipe.decay must be in [0, 1), got {self.decay}")
