"""The logits path in plain tensor operations, for CPUs and every device without Triton.

The same contract as the kernels: active rows only, a bounded number of them at a time, so that never more than
``CHUNK_BYTES`` of upcast logits exist beside the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""Upcast logits held at a time: a few rows of a large vocabulary, small enough to stay in a CPU's cache."""


def logps_forward(
    logits: Tensor, labels: Tensor, token_weights: Tensor | None, shift: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``sum [N]``, ``length [N]`` and ``lse [N, T]`` (0 on masked rows)."""
    dtype = accumulation_dtype(logits)
    _check_range(logits, labels, ignore_index)
    lse = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    logps = torch.zeros_like(lse)
    for n, t in _active_rows(logits, labels, shift, ignore_index):
        x = logits[n, t].to(dtype)
        target = labels[n, t + shift].long()
        row_lse = x.logsumexp(-1)
        lse[n, t] = row_lse
        logps[n, t] = _gather(x, target) - row_lse
    weights = _aligned_weights(labels, token_weights, shift, ignore_index, dtype)
    return (weights * logps).sum(1), weights.sum(1), lse


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
    """Writes ``dlogits`` into ``grad`` (every element), which may be ``logits`` itself."""
    weights = _aligned_weights(labels, token_weights, shift, ignore_index, lse.dtype)
    w = grad_sum[:, None] * weights
    for n, t in _active_rows(logits, labels, shift, ignore_index):
        target = labels[n, t + shift].long()
        x = logits[n, t].to(lse.dtype)
        row = x.sub_(lse[n, t, None]).exp_().neg_()
        inside = (target >= 0) & (target < logits.shape[-1])
        row.scatter_add_(1, torch.where(inside, target, 0)[:, None], inside[:, None].to(row.dtype))
        grad[n, t] = (w[n, t, None] * row).to(grad.dtype)
    grad[~_active(labels, shift, ignore_index)] = 0


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _active(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """``[N, T]``: whether the logits at (n, t) predict a label that counts."""
    active = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    T = labels.shape[1]
    active[:, : T - shift] = labels[:, shift:] != ignore_index
    return active


def _active_rows(logits: Tensor, labels: Tensor, shift: int, ignore_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    row_bytes = logits.shape[-1] * accumulation_dtype(logits).itemsize
    rows = _active(labels, shift, ignore_index).nonzero()
    for chunk in rows.split(max(1, CHUNK_BYTES // row_bytes)):
        yield chunk[:, 0], chunk[:, 1]


def _aligned_weights(
    labels: Tensor, token_weights: Tensor | None, shift: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """``[N, T]``: the weight with which the logits at (n, t) count, 0 where they are masked."""
    active = _active(labels, shift, ignore_index)
    if token_weights is None:
        return active.to(dtype)
    # The last column has nothing to predict when shifted: wherever roll() puts it, it is masked.
    return torch.where(active, token_weights.to(dtype).roll(-shift, dims=1), 0)


def _gather(x: Tensor, target: Tensor) -> Tensor:
    """The label's logit; NaN for a label outside the vocabulary."""
    inside = (target >= 0) & (target < x.shape[-1])
    logit = x.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    return torch.where(inside, logit, torch.nan)


def _check_range(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """On a CPU looking is free, so a bad label is an error; elsewhere it would cost a sync and is a NaN."""
    if labels.device.type != "cpu":
        return
    V = logits.shape[-1]
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {V}) or {ignore_index} (ignored), got {int(wrong[0])} "
            f"and {wrong.numel() - 1} more outside"
        )
