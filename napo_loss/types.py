"""The small records that travel between the functions: log-probs in, losses out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import transformed, upcast
from napo_loss.trees import Record, SharesGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_LENGTH = 1e-9
"""Divisor where a sequence has no active position, so that its mean log-prob is 0 and not NaN."""


class TokenStatistics(NamedTuple):
    """What one pass over the logits also tells of each position, see :func:`napo_loss.linear_sequence_logps`.

    Aligned with the positions that predict, as logits are: shifted, entry t is about label t + 1. 0 and False where a
    position is not active; never differentiated. Processed logits are those that the softmax sees: after bias, scale
    and softcap.

    Attributes:
        entropy: ``−Σ_v p_v·log p_v`` in nats, ``[N, T]``, packed ``[total]``, float32 (float64 for float64).
        is_top1: whether no processed logit is larger than the label's, bool.
        mean_logits: mean of the processed logits over the vocabulary.
    """

    entropy: Tensor
    is_top1: Tensor
    mean_logits: Tensor


class SequenceLogps(NamedTuple):
    """Log-probabilities of whole sequences, as :func:`napo_loss.sequence_logps` returns them.

    Attributes:
        sum: ``Σ_t w_t·log π(y_t)`` over active positions, in nats, shape ``[N]`` (or any shape).
        length: number of active positions (or the sum of their token weights), same shape.
        tokens: of each position, where they were asked for.
        aux_loss: what a model adds to its loss beside the log-probs, such as the balance of its experts.
    """

    sum: Tensor
    length: Tensor
    tokens: TokenStatistics | None = None
    aux_loss: Tensor | None = None

    def __repr__(self) -> str:
        given = {name: x for name, x in self._asdict().items() if x is not None}
        return f"SequenceLogps({', '.join(f'{name}={x!r}' for name, x in given.items())})"

    @property
    def mean(self) -> Tensor:
        """``sum / length``, and 0 for a sequence without an active position."""
        dtype = self.sum.dtype
        least = max(MIN_LENGTH, torch.finfo(dtype).smallest_normal)  # float16 rounds the former to 0
        return self.sum / self.length.to(dtype).clamp_min(least)

    def pairs(self, K: int = 1) -> tuple[SequenceLogps, SequenceLogps]:
        """Splits a batch ordered ``[chosen; negative 1; …; negative K]``, the order of TRL's collators.

        Args:
            K: negatives per chosen; ``N`` must be a multiple of ``1 + K``.

        Returns:
            The chosen, ``[B]``, and the negatives, ``[B]`` for ``K = 1`` and ``[K, B]`` above, without what is not of
            sequences. Views: nothing is copied, and where the loss hands back one gradient for both, nothing is copied
            backward either.
        """
        N = self.sum.shape[0]
        if self.sum.dim() != 1 or K < 1 or N % (1 + K):
            raise ValueError(f"{list(self.sum.shape)} log-probs do not split into 1 chosen and K = {K} negatives")
        split = _slice if transformed() else _Pairs.apply
        (chosen, rejected), lengths = split(self.sum, K), _slice(self.length, K)
        return SequenceLogps(chosen, lengths[0]), SequenceLogps(rejected, lengths[1])


class MaskedLogps(NamedTuple):
    """Log-probs of which some belong to padding pairs: stands where they may in :func:`napo_loss.napo_loss`.

    A masked pair is not there: it changes neither q, moments, weights nor the losses of others, on this rank or any
    other, whatever stands in its log-probs, which get gradients of zero. Its own loss and rewards are 0, so the mean
    over pairs is a sum over their number, ``out.losses.sum() / pair_mask.sum()``; the sum over ranks of these numbers
    where ranks differ (docs/parallel.md).

    Attributes:
        logps: of the chosen, or of negatives, as they would stand here: a tensor or a :class:`SequenceLogps`.
        pair_mask: True for pairs that count, bool, shaped as the log-probs: ``[B]`` beside the chosen, which with a
            chosen masks all of its negatives; ``[K, B]`` beside stacked negatives masks these pairs alone. Where
            several are given, a pair counts that all of them count.

    Example:
        >>> import torch
        >>> from napo_loss import MaskedLogps, napo_loss
        >>> chosen, rejected = torch.tensor([-10.0, torch.nan]), torch.tensor([-30.0, 0.0])
        >>> out = napo_loss(MaskedLogps(chosen, torch.tensor([True, False])), rejected, None, None)
        >>> out.losses, out.q
        (tensor([0.1199, 0.0000]), tensor(0.9003))
    """

    logps: Tensor | SequenceLogps
    pair_mask: Tensor


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
        type(first) is type(second) is Tensor  # others, such as fake ones, have no memory to look at
        and not torch.is_grad_enabled()  # the view would drop the graph that a second derivative follows to `second`
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
        and first.dtype == second.dtype
    ):
        return first.as_strided((first.numel() + second.numel(),), (1,))
    return torch.cat([upcast(first).flatten(), upcast(second).flatten()]).to(first.dtype)


@dataclasses.dataclass(eq=False)
class LowRank(Record, tensors=("weight", "lora_A", "lora_B")):
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


@dataclasses.dataclass(eq=False)
class VocabShard(SharesGroup, Record, tensors=("local",)):
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


@dataclasses.dataclass(eq=False)
class NaPOOutput(Record, tensors=("losses", "chosen_rewards", "rejected_rewards", "q", "weights", "moments")):
    """What :func:`napo_loss.napo_loss` returns: it unpacks as the triple of DPO hooks, and carries what to log.

    Attributes:
        losses: one loss per chosen, weighted over negatives, ``[B]``, float32 (float64 for float64).
        chosen_rewards: ``β·(log π(y_w) − log π_ref(y_w))``, detached, ``[B]``.
        rejected_rewards: the same of the negatives, ``[B]``, or ``[K, B]`` in the order given.
        q: the robustness that was used, detached: ``[K]``, ``[K, B]`` where each pair has its own; without the K for
            one negative.
        weights: the weight of each negative, detached, ``[K]``, a scalar for one negative.
        moments: mean and mean square of the margins that q was read from, smoothed where the recipe smooths, ``[2, K]``
            (``[2]`` for one negative, ``[2, K, B]`` where each pair has its own): what the next step takes as
            ``previous_moments``.

    Example:
        >>> import torch
        >>> from napo_loss import napo_loss
        >>> out = napo_loss(torch.tensor([-10.0]), torch.tensor([-12.0]), None, None)
        >>> losses, chosen_rewards, rejected_rewards = out
        >>> len(out), out[0] is losses, out.q
        (3, True, tensor(0.9900))
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    q: Tensor
    weights: Tensor
    moments: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.losses, self.chosen_rewards, self.rejected_rewards))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index):
        return tuple(self)[index]
