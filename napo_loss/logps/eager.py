"""The steps of both paths in plain tensor operations, for CPUs and every device without Triton.

The same contract as the kernels: active rows only, a bounded number of them at a time, so that never more than
``CHUNK_BYTES`` of upcast logits exist beside the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.factored import Head
from napo_loss.logps.gemm import blocks
from napo_loss.logps.tokens import aligned_weights, targets

CHUNK_BYTES = 4 * 2**20
"""Upcast logits held at a time: a few rows of a large vocabulary, small enough to stay in a CPU's cache."""


def logps_forward(
    logits: Tensor, labels: Tensor, token_weights: Tensor | None, shift: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Returns ``sum [N]`` and ``length [N]``."""
    dtype = accumulation_dtype(logits)
    check_range(labels, logits.shape[-1], ignore_index)
    logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    for n, t, target, inside in _active_rows(logits, labels, shift, ignore_index):
        # One vectorised pass on a CPU, where logsumexp takes three.
        log_p = logits[n, t].log_softmax(-1, dtype=dtype)
        logps[n, t] = log_p.gather(1, target).where(inside, torch.nan).squeeze(1)
    weights = _aligned_weights(labels, token_weights, shift, ignore_index, dtype)
    return (weights * logps).sum(1), weights.sum(1)


def token_logps(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``logp [A]`` (NaN where the label is outside) and ``lse [A]`` of active positions, whose labels are aligned."""
    dtype = accumulation_dtype(logits)
    logp, lse = [logits.new_empty(0, dtype=dtype)], [logits.new_empty(0, dtype=dtype)]
    for n, t, target, inside in _active_rows(logits, targets, 0, ignore_index):
        x = logits[n, t].to(dtype)
        lse.append(x.logsumexp(-1))
        logp.append(x.gather(1, target).where(inside, torch.nan).squeeze(1) - lse[-1])
    return torch.cat(logp), torch.cat(lse)


def logps_backward(
    grad_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    shift: int,
    ignore_index: int,
) -> None:
    """Writes ``dlogits`` into ``grad`` (every element), which may be ``logits`` itself.

    ``lse [N, T]`` is that of a vocabulary of which these logits are a part; empty where they are all.
    """
    w = grad_sum[:, None] * _aligned_weights(labels, token_weights, shift, ignore_index, grad_sum.dtype)
    for n, t, target, inside in _active_rows(logits, labels, shift, ignore_index):
        row_w = w[n, t, None]
        if lse.numel():
            row = (logits[n, t].to(w.dtype) - lse[n, t, None]).exp_().mul_(-row_w)
        else:
            row = logits[n, t].softmax(-1, dtype=w.dtype).mul_(-row_w)
        row.scatter_add_(1, target, row_w.where(inside, 0))
        grad[n, t] = row.to(grad.dtype)
    grad[~_active(labels, shift, ignore_index)] = 0


def _active(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """``[N, T]``: whether the logits at (n, t) predict a label that counts."""
    return targets(labels, bool(shift), ignore_index) != ignore_index


def _active_rows(
    logits: Tensor, labels: Tensor, shift: int, ignore_index: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of active rows: their n and t, their label ``[rows, 1]`` (0 if outside), and whether it is inside."""
    V = logits.shape[-1]
    rows = _active(labels, shift, ignore_index).nonzero()
    for chunk in rows.split(max(1, CHUNK_BYTES // (V * accumulation_dtype(logits).itemsize))):
        n, t = chunk.unbind(1)
        target = labels[n, t + shift, None].long()
        inside = (target >= 0) & (target < V)
        yield n, t, target.where(inside, 0), inside


def _aligned_weights(
    labels: Tensor, token_weights: Tensor | None, shift: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """``[N, T]``: the weight with which the logits at (n, t) count, 0 where they are masked."""
    return aligned_weights(_active(labels, shift, ignore_index), token_weights, bool(shift), dtype)


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


def linear_rows(x: Tensor, head: Head, targets: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raw logits ``[rows, V]`` to ``logp`` and ``lse``. D goes to ``out``, which may be ``x``, and ``x`` is lost;
    without ``out`` it stays as it is.
    """
    V = x.shape[1]
    logp, lse = x.new_empty(len(x)), x.new_empty(len(x))
    for part in blocks(len(x), CHUNK_BYTES // (V * x.element_size())):
        z, target = x[part] if out is not None else x[part].clone(), targets[part, None].long()
        slope = _shape_logits(z, head, slice(0, V))
        inside = (target >= 0) & (target < V)
        target = target.where(inside, 0)
        peak = z.amax(1, keepdim=True)
        hit = z.sub_(peak).gather(1, target).where(inside, torch.nan)
        total = z.exp_().sum(1, keepdim=True)
        lse[part] = (peak + total.log()).squeeze(1)
        logp[part] = (hit - total.log()).squeeze(1)
        if out is not None:
            z.div_(-total).scatter_add_(1, target, inside.to(z.dtype))
            out[part] = z if slope is None else z.mul_(slope)
    return logp, lse


def linear_block(x: Tensor, head: Head, columns: slice, targets: Tensor, lse: Tensor, w: Tensor, out: Tensor) -> None:
    """Raw logits of some columns, overwritten, to ``w·D`` in ``out``, which may be ``x``."""
    for part in blocks(len(x), CHUNK_BYTES // (x.shape[1] * x.element_size())):
        z, target = x[part], targets[part, None].long() - columns.start
        slope = _shape_logits(z, head, columns)
        row_w = w[part, None]
        z.sub_(lse[part, None]).exp_().mul_(-row_w)
        inside = (target >= 0) & (target < x.shape[1])
        z.scatter_add_(1, target.where(inside, 0), row_w.where(inside, 0))
        out[part] = z if slope is None else z.mul_(slope)


def _shape_logits(x: Tensor, head: Head, columns: slice) -> Tensor | None:
    """Bias, logit scale and softcap in place; returns ``dz/dx``, None where it is 1."""
    if head.bias is not None:
        x += head.bias[columns]
    if head.scale != 1:
        x *= head.scale
    if not head.softcap:
        return None if head.scale == 1 else x.new_full((), head.scale)
    x.div_(head.softcap).tanh_()
    slope = (1 - x * x).mul_(head.scale)
    x *= head.softcap
    return slope
