"""Token log-probs where a vocabulary is split over ranks: an operator from logits, and the steps of the linear path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, uses_triton
from napo_loss.logps import eager
from napo_loss.logps.factored import Head, Steps
from napo_loss.logps.ops import sequence_logps_backward, sequence_logps_backward_
from napo_loss.parallel.columns import Columns, merge
from napo_loss.parallel.reductions import all_reduce

MASKED = -1
"""The local label of a position that does not count: unlike -100, no shift of a label by its shard's start gives it."""


@torch.library.custom_op("napo_loss::sharded_logps", mutates_args=())
def sharded_logps(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    columns: Sequence[int],
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``logp [N, T]``, 0 where masked, and for backward ``lse [N, T]`` and the labels ``[N, T]`` among these columns.

    ``columns`` and ``group``: :class:`napo_loss.vocabulary.Columns`. One host sync, the number of active positions.
    """
    here, triton = Columns.of(columns, group), uses_triton(backend, logits)
    if not triton:
        eager.check_range(targets, here.V, ignore_index)
    active, local = targets != ignore_index, targets - here.start
    inside = active & (local >= 0) & (local < here.count)
    local = local.where(inside, logits.shape[-1]).where(active, MASKED)  # elsewhere: a column that there is not
    rows = active.flatten().nonzero().squeeze(1)
    if triton:
        from napo_loss.kernels.logps_forward import logps_forward

        peak, total, hit = logps_forward(logits, local, 0, MASKED)
        lse = (peak[:, rows] + total[:, rows].log()).logsumexp(0)
        logp = hit[rows] - lse
    else:
        logp, lse = eager.token_logps(logits, local, MASKED)
    logp, lse = merge(logp, lse, inside.flatten()[rows], here)
    known = targets.flatten()[rows]
    logp = logp.where((known >= 0) & (known < here.V), torch.nan)
    return _spread(logp, rows, targets), _spread(lse, rows, targets), local


def _spread(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return x.new_zeros(like.numel()).index_copy_(0, rows, x).view(like.shape)


@sharded_logps.register_fake
def _(logits, targets, ignore_index, inplace_backward, columns, group, backend):
    new = logits.new_empty(targets.shape, dtype=accumulation_dtype(logits))
    return new, torch.empty_like(new), targets.new_empty(targets.shape)


def _setup_context(ctx, inputs, output):
    logits, _, _, ctx.inplace, _, _, ctx.backend = inputs
    ctx.save_for_backward(logits, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    logits, lse, local = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    # The logsumexp is that of all columns, so these columns need nobody; each position has a weight of its own.
    args = (grad.new_ones(len(grad)), logits, local, grad, lse, 0, MASKED, ctx.backend)
    if ctx.inplace:
        sequence_logps_backward_(*args)
        return logits.detach(), *(None,) * 6
    return sequence_logps_backward(*args), *(None,) * 6


sharded_logps.register_autograd(_backward, setup_context=_setup_context)


def sharded(steps: Steps, columns: Columns) -> Steps:
    """``steps`` for this rank's columns: D once the logsumexp of all columns is known."""

    def rows(x: Tensor, head: Head, targets: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        target = targets - columns.start
        inside = (target >= 0) & (target < columns.count)
        if columns.count:
            logp, lse = steps.rows(x, head, target, None)
        else:
            logp, lse = x.new_zeros(len(x)), x.new_full((len(x),), -torch.inf)
        logp, lse = merge(logp, lse, inside, columns)
        if out is not None:
            block(x, head, slice(0, columns.count), targets, lse, torch.ones_like(lse), out)
        return logp.where((targets >= 0) & (targets < columns.V), torch.nan), lse

    def block(x: Tensor, head: Head, at: slice, targets: Tensor, lse: Tensor, w: Tensor, out: Tensor) -> None:
        if columns.count:
            steps.block(x, head, at, targets - columns.start, lse, w, out)

    return Steps(rows, block, partial(all_reduce, process_group=columns.process_group), columns.width)
