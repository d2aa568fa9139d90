"""Reductions over ``torch.distributed``: of means over data-parallel ranks, of sums over parts of a sequence.

Nothing here runs unless a process group is given. What a split vocabulary exchanges is in ``columns``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.checks import check_group, check_tensor
from napo_loss.types import SequenceLogps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_reduce_logps(logps: SequenceLogps, process_group: ProcessGroup | None) -> SequenceLogps:
    r"""Adds up sequences whose positions are spread over ranks (context or sequence parallelism).

    ``sum_n = Σ_r sum_nr`` and ``length_n = Σ_r length_nr``. Positions may be split in any way; the labels are shifted
    *before* the split, since the last position of one rank predicts a token of another:
    ``sequence_logps(logits, labels, shift=False)``.

    The gradient is that of the sum over ranks of their (equal) losses: right where DDP or FSDP2 averages over these
    ranks too. Where gradients are *added* over them, divide the loss by their number (docs/parallel.md).

    Args:
        logps: of the positions of this rank; ``N``, and the order of the sequences, are the same on every rank.
        process_group: the ranks that share the sequences; ``None`` (``torch.distributed.group.WORLD`` before
            ``init_process_group`` is None): this process alone.

    Returns:
        :class:`SequenceLogps` of whole sequences, equal on every rank; ``tokens`` and ``aux_loss`` stay this rank's.

    Raises:
        TypeError: where ``logps`` is no SequenceLogps or ``process_group`` no process group.
        ValueError: where this process is not in the group.

    Example:
        >>> import torch
        >>> from napo_loss import all_reduce_logps, sequence_logps
        >>> labels = torch.tensor([[-100, 5, 1, -100]])  # shifted: position t predicts labels[:, t]
        >>> logps = sequence_logps(torch.zeros(1, 4, 8), labels, shift=False)
        >>> all_reduce_logps(logps, torch.distributed.group.WORLD).sum  # one process: nothing to add
        tensor([-4.1589])

    Source:
        The adjoint of an all-reduce whose result every rank uses is an all-reduce.
    """
    if not isinstance(logps, SequenceLogps):
        raise TypeError(f"logps must be a SequenceLogps, got {type(logps).__name__}")
    check_tensor("logps.sum", logps.sum)
    check_group("process_group", process_group)
    if process_group is None:
        return logps
    sums, lengths = _AllReduce.apply(torch.stack([upcast(logps.sum), upcast(logps.length.detach())]), process_group)
    return SequenceLogps(sums, lengths.detach(), logps.tokens, logps.aux_loss)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks, forward and backward. PyTorch's own differentiable one is deprecated, its successor private."""

    @staticmethod
    def forward(ctx, x: Tensor, process_group) -> Tensor:
        ctx.process_group = process_group
        return all_reduce(x.clone(memory_format=torch.contiguous_format), process_group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.process_group), None


def all_reduce(x: Tensor, process_group, *, largest: bool = False) -> Tensor:
    """``x`` summed over the ranks (or its largest value over them), in place."""
    import torch.distributed as dist

    dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=process_group)
    return x


def mean_over_group(
    means: Tensor, count: int | Tensor, *, by_count: bool, process_group: ProcessGroup | None
) -> Tensor:
    """The mean over ranks of each rank's ``means`` (a detached tensor), in one all-reduce.

    Args:
        means: this rank's means, several of each kind of sample, ``[n, ...]``.
        count: how many samples are behind them on this rank; a tensor ``[...]`` where their number differs from kind to
            kind. A rank without any takes part and changes nothing.
        by_count: weigh each rank by its count (the mean over all samples) instead of equally.
        process_group: the ranks; ``None`` means this rank alone and no communication.
    """
    if process_group is None:
        return means
    if isinstance(count, Tensor):
        weight = (count if by_count else count > 0).to(means.dtype)
        weighted = torch.where(count > 0, means * weight, 0.0)
    else:
        weight = means.new_full(means.shape[1:], float(count if by_count else count > 0))
        weighted = means * weight if count else torch.zeros_like(means)  # the mean of nothing is NaN
    packed = all_reduce(torch.cat([weighted, weight[None]]), process_group)  # of one size, masked or not
    return packed[:-1] / packed[-1].clamp_min(1)
