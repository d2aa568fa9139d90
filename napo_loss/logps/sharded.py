"""Token log-probs where a vocabulary is split over ranks: an operator from logits, and the steps of the linear path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, operator, uses_triton
from napo_loss.logps import eager
from napo_loss.logps.calls import LogitsCall, ShardedCall
from napo_loss.logps.ops import logits_gradient
from napo_loss.logps.records import Head, Steps
from napo_loss.logps.tokens import active_rows, spread
from napo_loss.parallel.columns import Columns, Rows, merge
from napo_loss.parallel.reductions import all_reduce

if TYPE_CHECKING:
    from napo_loss.kernels.logps_forward import Partials

MASKED = -1
"""The local target of a masked position: unlike -100, no shift of a label by its shard's start gives it."""
FORWARD = ShardedCall.signature("(Tensor, Tensor, Tensor)")


@operator(FORWARD)
def sharded_logps(*values) -> tuple[Tensor, Tensor, Tensor]:
    """``logp [N, T]``, 0 where masked, and for backward ``normalizer [2, N, T]``, that of all columns, and the targets
    ``[N, T]`` among these.

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
    rows = active_rows(targets, call.ignore_index)  # [A]
    if triton:
        from napo_loss.kernels.logps_forward import logps_forward

        found = _joined(logps_forward(logits, local, 0, MASKED), rows)
    else:
        found = eager.token_rows(logits, local, MASKED)
    found = merge(found, inside.flatten()[rows], columns)
    known = targets.flatten()[rows]
    logp = (found.hit - found.normalizer[1]).where((known >= 0) & (known < columns.V), torch.nan)
    return spread(logp, rows, targets), spread(found.normalizer, rows, targets), local


def _joined(
    partials: Partials,
    rows: Tensor,  # [A]
) -> Rows:
    """From the shares of the programs that read a row to the row."""
    part_peak = partials.peak[:, rows]  # [splits, A]
    peak = part_peak.amax(0)
    base = peak.masked_fill(peak == -torch.inf, 0)
    total = (partials.total[:, rows] * (part_peak - base).exp()).sum(0)
    return Rows(partials.target[rows] - peak, torch.stack([peak, total.log()]), torch.ones_like(total))


@sharded_logps.register_fake
def _(*values):
    call = ShardedCall.from_schema(*values)
    logp = call.logits.new_empty(call.targets.shape, dtype=accumulation_dtype(call.logits))
    return logp, logp.new_empty((2, *logp.shape)), call.targets.new_empty(call.targets.shape)


def _setup_context(ctx, inputs, output):
    _, normalizer, local_targets = output
    ShardedCall.save(ctx, inputs, normalizer=normalizer, local_targets=local_targets)


def _backward(ctx, grad, *_):
    if grad is None:
        return ShardedCall.gradients()
    call, outputs = ShardedCall.restore(ctx)
    # The normalizer is that of all columns, so these columns need nobody; each position has a weight of its own.
    here = LogitsCall.of_targets(
        call.logits, outputs["local_targets"], token_weights=grad, ignore_index=MASKED,
        inplace_backward=call.inplace_backward, backend=call.backend,
    )  # fmt: skip
    return ShardedCall.gradients(logits=logits_gradient(grad.new_ones(len(grad)), outputs["normalizer"], here))


sharded_logps.register_autograd(_backward, setup_context=_setup_context)


@dataclass
class ShardedSteps(Steps):
    """For this rank's columns: dlogits once the normalizer of all columns is known."""

    columns: Columns

    def rows(
        self,
        logits: Tensor,  # [rows, columns]
        targets: Tensor,  # [rows], among the whole vocabulary
        head: Head,
        dlogits: Tensor | None = None,  # [rows, columns]
        *,
        statistics: bool = False,
    ) -> Rows:
        columns, local = self.columns, targets - self.columns.start
        inside = (local >= 0) & (local < columns.count)
        if columns.count:
            found = super().rows(logits, local, head, statistics=statistics)
        else:
            zero = logits.new_zeros(len(logits))
            none, one = torch.full_like(zero, -torch.inf), torch.ones_like(zero)
            found = Rows.of(torch.stack([zero, none, none, one, *([zero, zero] if statistics else [])]))
        found = merge(found, inside, columns)
        if dlogits is not None:
            self.block(logits, targets, head, 0, found.normalizer, torch.ones_like(found.hit), dlogits)
        return found._replace(hit=found.hit.where((targets >= 0) & (targets < columns.V), torch.nan))

    def block(
        self,
        logits: Tensor,  # [rows, columns], those of this rank from `first` on
        targets: Tensor,  # [rows], among the whole vocabulary
        head: Head,
        first: int,
        normalizer: Tensor,  # [2, rows]
        w: Tensor,  # [rows]
        dlogits: Tensor,  # [rows, columns]
    ) -> None:
        if self.columns.count:
            super().block(logits, targets - self.columns.start, head, first, normalizer, w, dlogits)

    def reduce(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.columns.process_group)

    def width(self, V: int) -> int:
        return self.columns.width
