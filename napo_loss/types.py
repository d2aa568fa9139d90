"""The small records that travel between the functions: log-probs in, settings beside them, losses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_LENGTH = 1e-9
"""Divisor where a sequence has no active position, so that its mean log-prob is 0 and not NaN."""


class SequenceLogps(NamedTuple):
    """Log-probabilities of whole sequences, as :func:`napo_loss.sequence_logps` returns them.

    Attributes:
        sum: ``Σ_t w_t·log π(y_t)`` over active positions, in nats, shape ``[N]`` (or any shape).
        length: number of active positions (or the sum of their token weights), same shape.
    """

    sum: Tensor
    length: Tensor

    @property
    def mean(self) -> Tensor:
        """``sum / length``, and 0 for a sequence without an active position."""
        return self.sum / self.length.clamp_min(MIN_LENGTH)

    def pairs(self, K: int = 1) -> tuple[SequenceLogps, SequenceLogps]:
        """Splits a batch ordered ``[chosen; negative 1; …; negative K]``, the order of TRL's collators.

        Args:
            K: negatives per chosen; ``N`` must be a multiple of ``1 + K``.

        Returns:
            The chosen, ``[B]``, and the negatives, ``[B]`` for ``K = 1`` and ``[K, B]`` above. Views: nothing is
            copied, and where the loss hands back one gradient for both, nothing is copied backward either.
        """
        N = self.sum.shape[0]
        if self.sum.dim() != 1 or K < 1 or N % (1 + K):
            raise ValueError(f"{list(self.sum.shape)} log-probs do not split into 1 chosen and K = {K} negatives")
        # A compiler fuses what slicing costs, and knows it better than a Function.
        split = _slice if torch.compiler.is_compiling() else _Pairs.apply
        (chosen, rejected), lengths = split(self.sum, K), _slice(self.length, K)
        return SequenceLogps(chosen, lengths[0]), SequenceLogps(rejected, lengths[1])


def _slice(x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    B = x.shape[0] // (1 + K)
    return x[:B], x[B:] if K == 1 else x[B:].view(K, B)


class _Pairs(torch.autograd.Function):
    """``x [N]`` to views ``[B]`` and ``[K, B]``. Autograd's own slicing would launch kernels to add them up."""

    @staticmethod
    def forward(ctx, x: Tensor, K: int) -> tuple[Tensor, Tensor]:
        return _slice(x, K)

    @staticmethod
    def backward(ctx, grad_chosen: Tensor, grad_rejected: Tensor) -> tuple[Tensor, None]:
        return _join(grad_chosen, grad_rejected), None


def _join(first: Tensor, second: Tensor) -> Tensor:
    """``first`` and then ``second``, flat; a view where they already lie so in one buffer."""
    if (
        not torch.is_grad_enabled()  # the view would drop the graph that a second derivative follows to `second`
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
        and first.dtype == second.dtype
    ):
        return first.as_strided((first.numel() + second.numel(),), (1,))
    return torch.cat([first.flatten(), second.flatten()])


class LowRank(NamedTuple):
    """An lm_head with LoRA factors beside it: ``weight + scale·B·A``, which is never formed.

    Attributes:
        weight: ``[V, D]``, usually frozen.
        A: ``[r, D]``.
        B: ``[V, r]``.
        scale: PEFT's ``lora_alpha / r``.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float = 1.0


class VocabShard(NamedTuple):
    """The columns of a vocabulary that this rank of a process group holds, where tensor parallelism splits it.

    Stands in for ``logits`` or ``weight``; positions and labels are the same on every rank of the group, and so is what
    comes out.

    Attributes:
        local: logits ``[N, T, V_local]``, or an lm_head ``[V_local, D]``, or a :class:`LowRank` of one (with all of A
            and the local rows of B). ``V_local`` may be 0.
        process_group: the ranks that hold the rest; ``None``: this rank holds all.
        V: size of the vocabulary. Columns from V on are padding: they do not count, and cost the rank that has them a
            copy of the gradient. Shards that do not hold every column once give NaN.
        start: first column here. Default: ``rank·V_local``, all shards being equal, with their padding.

    Example:
        >>> import torch
        >>> from napo_loss import VocabShard, sequence_logps
        >>> padded = torch.zeros(1, 3, 10)  # 8 tokens and 2 columns of padding, in a group of one
        >>> shard = VocabShard(padded, torch.distributed.group.WORLD, V=8)
        >>> sequence_logps(shard, torch.tensor([[-100, 5, 1]])).sum
        tensor([-4.1589])
    """

    local: Tensor | LowRank
    process_group: ProcessGroup | None
    V: int
    start: int | None = None


class PreferenceLoss(NamedTuple):
    """Per-sample losses and rewards: the triple that every DPO hook returns.

    Attributes:
        losses: one loss per sample, float32, not reduced.
        chosen_rewards: ``β·(log π(y_w) − log π_ref(y_w))``, detached.
        rejected_rewards: the same of the rejected sequence, detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class NaPOLoss(PreferenceLoss):
    """The triple of :class:`PreferenceLoss` — it unpacks as three — which also carries what to log.

    Attributes:
        q: the robustness that was used, detached: ``[K]``, or ``[K, B]`` when estimated per sample.
        weights: the weight of each negative, detached, ``[K]``.
    """

    q: Tensor
    weights: Tensor

    def __new__(cls, losses, chosen_rewards, rejected_rewards, q, weights):
        self = super().__new__(cls, losses, chosen_rewards, rejected_rewards)
        self.q = q
        self.weights = weights
        return self


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
