"""The plain-tensor twin of this room's kernels, for CPUs and every device without Triton.

Functions that stand in for a launcher have its name, its arguments and its contract: active rows only, a bounded number
of them at a time, so that never more than ``CHUNK_BYTES`` of upcast logits exist beside the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.active import CHUNK_BYTES, ActiveRows, is_active
from napo_loss.logps.gemm import blocks
from napo_loss.logps.tokens import aligned_weights, weighted
from napo_loss.parallel.columns import Rows

LEAST = -200.0
"""Nats below the peak beyond which an exponential is 0, and 0 times it: a logit of -inf adds nothing to an entropy."""


def logps_forward(
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    shift: int,
    ignore_index: int,
) -> Tensor:
    """Log-probs ``[N, T]`` of what each position predicts, 0 where masked."""
    dtype = accumulation_dtype(logits)
    check_range(labels, logits.shape[-1], ignore_index)
    logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    active = ActiveRows.of(logits, labels, shift, ignore_index)
    # The labels' logits of all rows at once: at small V the number of operations counts, not their size.
    hit = logits[active.n, active.t, active.target.squeeze(1)].to(dtype)
    log_totals = torch.empty_like(hit)
    for rows, _, z in active.chunks(logits):
        peak = z.amax(1, keepdim=True)
        torch.sum(z.sub_(peak).exp_(), 1, out=log_totals[rows])
        hit[rows] -= peak.squeeze(1)
    logps[active.n, active.t] = (hit - log_totals.log_()).where(active.inside.squeeze(1), torch.nan)
    return logps


def logps_reduce(
    partials: Tensor,  # [N, T], what logps_forward left
    labels: Tensor,  # [N, T]
    token_weights: Tensor | None,  # [N, T]
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum [N]``, ``length [N]`` and no normalizer: backward has its own softmax."""
    weights = _aligned_weights(labels, token_weights, shift, ignore_index, partials.dtype)
    counted = partials if token_weights is None else weighted(weights, partials)
    return counted.sum(1), weights.sum(1), partials.new_empty(0)


def token_rows(
    logits: Tensor,  # [N, T, V]
    targets: Tensor,  # [N, T]: labels, aligned with the positions that predict them
    ignore_index: int,
) -> Rows:
    """Of active positions ``[A]``."""
    active = ActiveRows.of(logits, targets, 0, ignore_index)
    found = logits.new_ones((4, len(active.n)), dtype=accumulation_dtype(logits))
    for rows, _, z in active.chunks(logits):
        hit, peak = _less_peak(z, active.target[rows], active.inside[rows])
        found[:3, rows] = torch.cat([hit, peak, z.exp_().sum(1, keepdim=True).log_()], 1).t()
    return Rows.of(found)


def _less_peak(
    z: Tensor,  # [rows, columns]
    target: Tensor,  # [rows, 1]
    inside: Tensor,  # [rows, 1]
) -> tuple[Tensor, Tensor]:
    """The label's logit less the peak (NaN where it is outside) and the peak, ``[rows, 1]``, which z then lacks."""
    peak = z.amax(1, keepdim=True)
    z.sub_(peak.masked_fill(peak == -torch.inf, 0))  # of columns that are all -inf there is nothing to subtract
    return z.gather(1, target).where(inside, torch.nan), peak


def logps_backward(
    grad_sum: Tensor,  # [N]
    logits: Tensor,  # [N, T, V]
    labels: Tensor,  # [N, T]
    token_weights: Tensor | None,  # [N, T]
    normalizer: Tensor,  # [2, N, T] of a vocabulary of which these logits are a part; empty where they are all
    dlogits: Tensor,  # [N, T, V]
    shift: int,
    ignore_index: int,
) -> None:
    """Writes ``dlogits`` (every element), which may be ``logits`` itself."""
    w = _aligned_weights(labels, token_weights, shift, ignore_index, grad_sum.dtype)
    w = grad_sum[:, None] * w if token_weights is None else weighted(w, grad_sum[:, None])
    active = ActiveRows.of(logits, labels, shift, ignore_index)
    weights = w[active.n, active.t, None]
    hits = weights.where(active.inside, 0)
    if normalizer.numel():
        peaks, log_totals = normalizer[:, active.n, active.t, None]
    for chunk in active.chunks(logits):
        rows, _, z = chunk
        if normalizer.numel():
            z.sub_(peaks[rows]).sub_(log_totals[rows]).exp_()
        else:
            torch.softmax(z, -1, out=z)
        z.mul_(-weights[rows]).scatter_add_(1, active.target[rows], hits[rows])
        chunk.leave(dlogits)
    dlogits[~is_active(labels, shift, ignore_index)] = 0


def _aligned_weights(
    labels: Tensor, token_weights: Tensor | None, shift: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """``[N, T]``: the weight with which the logits at (n, t) count, 0 where they are masked."""
    return aligned_weights(is_active(labels, shift, ignore_index), token_weights, bool(shift), dtype)


def check_range(labels: Tensor, V: int, ignore_index: int) -> None:
    """On a CPU looking is free, so a bad label is an error; elsewhere it would cost a sync and is a NaN."""
    if labels.device.type != "cpu":
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {V}) or {ignore_index} (ignored), got {int(wrong[0])} "
            f"and {wrong.numel() - 1} more outside"
        )


def linear_rows(
    logits: Tensor,  # [rows, V]
    targets: Tensor,  # [rows]
    dlogits: Tensor | None,  # [rows, V]
    *,
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float,
    statistics: bool = False,
) -> Tensor:
    """Raw logits to ``[4 or 6, rows]``: see :meth:`napo_loss.parallel.columns.Rows.of`. Writes unit ``dlogits``, which
    may be ``logits``, and these are lost; without ``dlogits`` they stay as they are.
    """
    rows, V = logits.shape
    out = logits.new_empty((6 if statistics else 4, rows))
    # Where dlogits have the exponents of float32, dividing each by the sum is left to who multiplies them anyway.
    divides = dlogits is not None and dlogits.dtype == torch.float16
    parts = blocks(rows, CHUNK_BYTES // (V * logits.element_size()))
    # Made once: a system clears the pages of what is made for each part, which takes longer than to use them.
    of_part = (parts[0].stop, V) if parts else (0, V)
    copy = logits.new_empty(of_part) if dlogits is None else logits
    powers = logits.new_empty(of_part) if statistics else logits
    for part in parts:
        z = logits[part] if dlogits is not None else copy[: part.stop - part.start].copy_(logits[part])
        slope = _shape_logits(z, bias, logit_scale, softcap)
        target = targets[part, None].long()
        inside = (target >= 0) & (target < V)
        target = target.where(inside, 0)
        mean = z.mean(1, keepdim=True) if statistics else None
        hit, peak = _less_peak(z, target, inside)
        power = torch.clamp(z, min=LEAST, out=powers[: len(z)]) if statistics else None
        total = z.exp_().sum(1, keepdim=True)
        found = [hit, peak, total.log(), -logit_scale / total]
        if power is not None and mean is not None:
            found += [found[2] - power.mul_(z).sum(1, keepdim=True) / total, mean]
        if dlogits is not None:
            if divides:
                z.div_(total)
                found[3], total = torch.full_like(total, -logit_scale), 1.0
            z.scatter_add_(1, target, inside * -total)
            _leave(z if slope is None else z.mul_(slope), dlogits[part])
        out[:, part] = torch.cat(found, 1).t()
    return out


def linear_block(
    logits: Tensor,  # [rows, columns], those of the vocabulary from `first` on
    targets: Tensor,  # [rows]
    first: int,
    normalizer: Tensor,  # [2, rows]
    w: Tensor,  # [rows]
    dlogits: Tensor,  # [rows, columns]
    *,
    bias: Tensor | None,  # [columns]
    logit_scale: float,
    softcap: float,
) -> None:
    """Raw logits, which are lost, to ``dlogits`` with the weight ``w``; may be written over the logits."""
    rows, columns = logits.shape
    for part in blocks(rows, CHUNK_BYTES // (columns * logits.element_size())):
        z = logits[part]
        slope = _shape_logits(z, bias, logit_scale, softcap)
        target = targets[part, None].long() - first
        inside = (target >= 0) & (target < columns)
        row_w = w[part, None] * logit_scale
        peak, log_total = normalizer[:, part, None]
        z.sub_(peak).sub_(log_total).exp_().mul_(-row_w)
        z.scatter_add_(1, target.where(inside, 0), row_w.where(inside, 0))
        _leave(z if slope is None else z.mul_(slope), dlogits[part])


def _leave(x: Tensor, there: Tensor) -> None:
    """Copies, unless it is where it should be."""
    if x.data_ptr() != there.data_ptr():
        there.copy_(x)


def _shape_logits(
    x: Tensor,  # [rows, columns]
    bias: Tensor | None,  # [columns]
    logit_scale: float,
    softcap: float,
) -> Tensor | None:
    """Raw logits x to logits z, in place; returns ``dz/dy``, the slope of a softcap, None where it is 1."""
    if bias is not None:
        x += bias
    if logit_scale != 1:
        x *= logit_scale
    if not softcap:
        return None
    x.div_(softcap).tanh_()
    slope = 1 - x * x
    x *= softcap
    return slope
