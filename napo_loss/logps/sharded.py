"""Token log-probs where a vocabulary is split over ranks: an operator from logits, and the steps of the linear path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, uses_triton
from napo_loss.logps import eager
from napo_loss.logps.calls import LogitsCall, ShardedCall
from napo_loss.logps.ops import logits_gradient
from napo_loss.logps.records import Head, Steps
from napo_loss.parallel.columns import Columns, merge
from napo_loss.parallel.reductions import all_reduce

MASKED = -1
"""The local target of a masked position: unlike -100, no shift of a label by its shard's start gives it."""
FORWARD = ShardedCall.signature("(Tensor, Tensor, Tensor)")


@torch.library.custom_op("napo_loss::sharded_logps", mutates_args=(), schema=FORWARD)
def sharded_logps(*values) -> tuple[Tensor, Tensor, Tensor]:
    """``logp [N, T]``, 0 where masked, and for backward ``lse [N, T]`` and the targets ``[N, T]`` among these columns.

    One host sync, the number of active positions.
    """
    call = ShardedCall.from_schema(*values)
    logits, targets, columns = call.logits, call.targets, call.columns
    triton = uses_triton(call.backend, logits)
    if not triton:
        eager.check_range(targets, columns.V, call.ignore_index)
    active, local = targets != call.ignore_index, targets - columns.start
    inside = active & (local >= 0) & (local < columns.count)
    local = local.where(inside, logits.shape[-1]).where(active, MASKED)  # elsewhere: a column that there is not
    rows = active.flatten().nonzero().squeeze(1)  # [A]
    if triton:
        from napo_loss.kernels.logps_forward import logps_forward

        partials = logps_forward(logits, local, 0, MASKED)
        lse = (partials.peak[:, rows] + partials.total[:, rows].log()).logsumexp(0)
        logp = partials.target[rows] - lse
    else:
        logp, lse = eager.token_logps(logits, local, MASKED)
    logp, lse = merge(logp, lse, inside.flatten()[rows], columns)
    known = targets.flatten()[rows]
    logp = logp.where((known >= 0) & (known < columns.V), torch.nan)
    return _spread(logp, rows, targets), _spread(lse, rows, targets), local


def _spread(
    x: Tensor,  # [A]
    rows: Tensor,  # [A]
    like: Tensor,  # [N, T]
) -> Tensor:
    return x.new_zeros(like.numel()).index_copy_(0, rows, x).view(like.shape)


@sharded_logps.register_fake
def _(*values):
    call = ShardedCall.from_schema(*values)
    logp = call.logits.new_empty(call.targets.shape, dtype=accumulation_dtype(call.logits))
    return logp, torch.empty_like(logp), call.targets.new_empty(call.targets.shape)


def _setup_context(ctx, inputs, output):
    _, lse, local_targets = output
    ShardedCall.save(ctx, inputs, lse=lse, local_targets=local_targets)


def _backward(ctx, grad, grad_lse, grad_targets):
    if grad is None:
        return ShardedCall.gradients()
    call, outputs = ShardedCall.restore(ctx)
    # The logsumexp is that of all columns, so these columns need nobody; each position has a weight of its own.
    here = LogitsCall.of_targets(
        call.logits, outputs["local_targets"], token_weights=grad, ignore_index=MASKED,
        inplace_backward=call.inplace_backward, backend=call.backend,
    )  # fmt: skip
    return ShardedCall.gradients(logits=logits_gradient(grad.new_ones(len(grad)), outputs["lse"], here))


sharded_logps.register_autograd(_backward, setup_context=_setup_context)


@dataclass
class ShardedSteps(Steps):
    """For this rank's columns: dlogits once the logsumexp of all columns is known."""

    columns: Columns

    def rows(
        self,
        logits: Tensor,  # [rows, columns]
        targets: Tensor,  # [rows], among the whole vocabulary
        head: Head,
        dlogits: Tensor | None = None,  # [rows, columns]
    ) -> tuple[Tensor, Tensor]:
        columns, local = self.columns, targets - self.columns.start
        inside = (local >= 0) & (local < columns.count)
        if columns.count:
            logp, lse = super().rows(logits, local, head)
        else:
            logp, lse = logits.new_zeros(len(logits)), logits.new_full((len(logits),), -torch.inf)
        logp, lse = merge(logp, lse, inside, columns)
        if dlogits is not None:
            self.block(logits, targets, head, 0, lse, torch.ones_like(lse), dlogits)
        return logp.where((targets >= 0) & (targets < columns.V), torch.nan), lse

    def block(
        self,
        logits: Tensor,  # [rows, columns], those of this rank from `first` on
        targets: Tensor,  # [rows], among the whole vocabulary
        head: Head,
        first: int,
        lse: Tensor,  # [rows]
        w: Tensor,  # [rows]
        dlogits: Tensor,  # [rows, columns]
    ) -> None:
        if self.columns.count:
            super().block(logits, targets - self.columns.start, head, first, lse, w, dlogits)

    def reduce(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.columns.process_group)

    def width(self, V: int) -> int:
        return self.columns.width
