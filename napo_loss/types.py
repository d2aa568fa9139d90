"""The small records that travel between the functions: log-probs in, losses out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    """An lm_head with LoRA factors beside it: ``weight + scale·lora_B·lora_A``, which is never formed.

    Attributes:
        weight: ``[V, D]``, usually frozen.
        lora_A: ``[r, D]``.
        lora_B: ``[V, r]``.
        scale: PEFT's ``lora_alpha / r``.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0


class VocabShard(NamedTuple):
    """The columns of a vocabulary that this rank of a process group holds, where tensor parallelism splits it.

    Stands in for ``logits`` or ``weight``; positions and labels are the same on every rank of the group, and so is what
    comes out.

    Attributes:
        local: logits ``[N, T, V_local]``, or an lm_head ``[V_local, D]``, or a :class:`LowRank` of one (with all of
            lora_A and the local rows of lora_B). ``V_local`` may be 0.
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
