"""From labels to what each position predicts, and from token log-probs back to sequences; padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_loss.types import SequenceLogps


class Packing:
    """Sequences that lie one after the other in ``[total]``: sequence n is ``cu_seqlens[n]:cu_seqlens[n + 1]``.

    Offsets are device values: looking at them would cost a sync, so wrong ones give NaN (on a CPU
    :func:`napo_loss.checks.check_cu_seqlens` has looked). No memory access depends on them.
    """

    def __init__(self, cu_seqlens: Tensor, total: int):
        self.N = cu_seqlens.shape[0] - 1
        at = torch.arange(total, device=cu_seqlens.device)
        cu_seqlens = cu_seqlens.long().contiguous()
        self.sequence = torch.searchsorted(cu_seqlens, at, right=True) - 1
        steps_up = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        self.valid = steps_up & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)

    def sum(self, x: Tensor) -> Tensor:
        """``[total]`` to ``[N]``, always in the same order of additions."""
        member = self.sequence == torch.arange(self.N, device=x.device)[:, None]
        return torch.where(member, x, 0).sum(1).where(self.valid, torch.nan)


def targets(labels: Tensor, shift: bool, ignore_index: int, packing: Packing | None = None) -> Tensor:
    """The label that each position predicts, ``ignore_index`` where it predicts none; the shape of ``labels``."""
    if not shift:
        return labels
    moved = torch.full_like(labels, ignore_index)
    moved[..., :-1] = labels[..., 1:]
    if packing is not None:
        last = packing.sequence[1:] != packing.sequence[:-1]
        moved[:-1].masked_fill_(last, ignore_index)
    return moved


def aligned_weights(active: Tensor, token_weights: Tensor | None, shift: bool, dtype: torch.dtype) -> Tensor:
    """The weight with which each position counts, 0 where it is masked."""
    if token_weights is None:
        return active.to(dtype)
    # The last position predicts nothing when shifted: wherever roll() puts its weight, it is masked.
    return torch.where(active, token_weights.detach().to(dtype).roll(-int(shift), dims=-1), 0)


def active_rows(
    targets: Tensor,  # [N, T]
    ignore_index: int,
    max_active: int = 0,
) -> Tensor:
    """Indices ``[A]`` into N·T. Their number is a host sync, unless there is a bound of it: then A is the bound, and
    those beyond the active ones are N·T, a position that does not exist.
    """
    active = (targets != ignore_index).flatten()
    if not max_active:
        return active.nonzero().squeeze(1)
    return torch.nonzero_static(active, size=max_active, fill_value=len(active)).squeeze(1)


def spread(
    x: Tensor,  # […, A]
    rows: Tensor,  # [A] indices into N·T, or beyond
    like: Tensor,  # [N, T]
) -> Tensor:
    """``[…, N, T]``, contiguous as kernels and fakes take it to be; 0 where a position is not active."""
    out = x.new_zeros((*x.shape[:-1], like.numel() + 1)).index_copy_(-1, rows, x)
    return out[..., :-1].contiguous().unflatten(-1, like.shape)


def gathered(
    x: Tensor,  # [N, T, …]
    rows: Tensor,  # [A]
    *,
    bounded: bool,
) -> Tensor:
    """``[A, …]``; 0 for the rows beyond the active ones, which there are where their number is only ``bounded``."""
    T = x.shape[1]
    if not bounded:
        return x[rows // T, rows % T]
    beyond = rows == x.shape[0] * T
    at = rows.masked_fill(beyond, 0)
    return x[at // T, at % T].masked_fill(beyond.view(-1, *[1] * (x.dim() - 2)), 0)


def weighted(weights: Tensor, token_logps: Tensor) -> Tensor:
    """``weights·token_logps``; a token of weight 0 does not count, though the policy excludes it: 0·−inf = 0."""
    return torch.where(weights == 0, 0, weights * token_logps)


def per_sequence(
    token_logps: Tensor, active: Tensor, token_weights: Tensor | None, shift: bool, packing: Packing | None
) -> SequenceLogps:
    """Weighted sums of token log-probs. ``active`` and the log-probs are aligned with the positions that predict."""
    weights = aligned_weights(active, token_weights, shift, token_logps.dtype)
    total = (lambda x: x.sum(1)) if packing is None else packing.sum
    counted = token_logps if token_weights is None else weighted(weights, token_logps)  # masked ones are 0 already
    return SequenceLogps(total(counted), total(weights))
