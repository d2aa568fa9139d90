"""Hidden states × lm_head to token log-probs, and its backward: which products, over which rows, in which order.

For any loss of log-probs ``dlogits = w·(onehot − softmax)`` (times the slope of softcap and scale) with one weight w
per row that only the backward pass knows. ``unit_`` marks what is known before it. So the forward pass goes through the
active rows in chunks: logits, then ``unit_dlogits`` in their place, then ``unit_dhidden = unit_dlogits·weight``. The
former may lack another number of the row, ``unit_scale``: a sum of exponentials is known once all of them are written.
Backward only rescales: ``dhidden = w·unit_scale ⊙ unit_dhidden``. The other gradient,
``dweight = dlogitsᵀ·hidden``, comes from ``unit_dlogits`` where they were kept, and otherwise from logits computed
again, a block of the vocabulary at a time, so that each entry of it is one float32 sum, rounded once.

The two steps that are not matrix products come as :class:`Steps`: Triton kernels or plain tensor operations. Here ``h``
are the hidden states of some rows, ``raw`` their logits as the products leave them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.gemm import HALF, balanced, blocks, mm_float32, mm_into, padded
from napo_loss.logps.memory import columns_at_a_time, in_parts, rows_at_a_time, scratch_bytes
from napo_loss.logps.records import Gradients, Head, Saved, Steps
from napo_loss.logps.tokens import active_rows, gathered, spread


class Forward(NamedTuple):
    """What the forward pass gives; 0 where a position is masked."""

    logp: Tensor  # [N, T]
    statistics: Tensor  # [3, N, T]: entropy, 1 where the label is on top, mean of the logits; empty if not asked for
    saved: Saved


def forward(call: LinearCall, budget: int, steps: Steps) -> Forward:
    """One host sync: the number of active rows; none where the call bounds it."""
    hidden, head, needs = call.hidden, call.head, call.needs
    V, full = head.weight.shape[0], accumulation_dtype(hidden)
    rows = active_rows(call.targets, call.ignore_index, call.max_active)  # [A]
    A, targets = len(rows), _gather(call.targets, rows, call)
    scratch = min(budget, scratch_bytes(hidden.device))
    keep = needs.dlogits and _kept_bytes(A, V, hidden.dtype, scratch) <= budget

    logp = hidden.new_empty(A, dtype=full)
    statistics = hidden.new_empty((3, A) if call.token_statistics else 0, dtype=full)
    saved = Saved.empty(rows, hidden, head, needs, kept=A if keep else 0)

    def work(chunk: slice) -> None:
        h = _gather(hidden, rows[chunk], call)
        kept = saved.unit_dlogits[chunk] if keep else None
        raw = _raw_logits(h, _times_lora_A(h, head), head, out=kept if hidden.dtype == full else None)
        if not (keep or needs.hidden or needs.lora):
            dlogits = None
        elif hidden.dtype == full:
            dlogits = raw  # they replace the logits
        elif kept is not None:
            dlogits = kept
        else:
            dlogits = padded(hidden, len(h), V)
        found = steps.rows(raw, targets[chunk], head, dlogits, statistics=call.token_statistics)
        torch.sub(found.hit, found.normalizer[1], out=logp[chunk])
        saved.normalizer[:, chunk], saved.unit_scale[chunk] = found.normalizer, found.unit_scale
        if found.statistics is not None:
            statistics[0, chunk], statistics[2, chunk] = found.statistics
            statistics[1, chunk] = (found.hit == 0).to(full)
        del raw
        if dlogits is not None:
            _times_head(dlogits, call, saved, chunk)

    chunks = balanced(A, rows_at_a_time(hidden, steps.width(V), scratch), hidden.device.type)
    in_parts(work, chunks, alone=call.columns is None)
    per_position = spread(statistics, rows, call.targets) if call.token_statistics else statistics
    whole = spread(logp, rows, call.targets)  # [N, T]
    if call.max_active:
        too_many = (call.targets != call.ignore_index).sum() > call.max_active
        whole.masked_fill_(too_many, torch.nan)  # more cannot be said without a sync; those left out are NaN too
    return Forward(whole, per_position, saved)


def backward(
    grad: Tensor,  # [N, T]: of logp
    call: LinearCall,
    saved: Saved,
    budget: int,
    steps: Steps,
) -> Gradients:
    hidden, head, needs = call.hidden, call.head, call.needs
    full = saved.normalizer.dtype
    w = _gather(grad, saved.rows, call).to(full)  # [A]
    unit_w = w * saved.unit_scale
    dhidden = None
    if needs.hidden:
        (N, T, D) = hidden.shape
        all_rows = hidden.new_zeros((N * T + 1, D))  # one for the rows beyond the active ones
        # Without a name, so that the float32 [A, D] are gone before the products for the head.
        all_rows[saved.rows] = steps.reduce(unit_w[:, None] * saved.unit_dhidden).to(hidden.dtype)
        dhidden = all_rows[:-1].view(N, T, D)
    if not needs.dlogits:
        return Gradients(hidden=dhidden)

    h = _gather(hidden, saved.rows, call)  # [A, D]
    dlora_A = None
    if needs.lora and head.lora_A is not None:
        dlogits_lora_B = unit_w[:, None] * saved.unit_dlogits_lora_B  # [A, r]
        product = mm_float32(dlogits_lora_B.t(), h.to(full)).mul_(head.lora_scale)
        dlora_A = steps.reduce(product).to(head.lora_A.dtype)
    per_column = _backward_of_columns(h, unit_w if saved.keeps_dlogits else w, call, saved, budget, steps)
    return per_column._replace(hidden=dhidden, lora_A=dlora_A)


def _backward_of_columns(
    h: Tensor,  # [A, D]
    w: Tensor,  # [A] what saved dlogits lack, or those that are made here
    call: LinearCall,
    saved: Saved,
    budget: int,
    steps: Steps,
) -> Gradients:
    """Of the tensors with a row for each column of the vocabulary: ``dlogitsᵀ`` times the other factor, in blocks."""
    head, needs, V = call.head, call.needs, call.head.weight.shape[0]
    targets = _gather(call.targets, saved.rows, call)  # [A]
    h_lora_A = _times_lora_A(h, head)
    kept = saved.keeps_dlogits

    def factor(x: Tensor) -> Tensor:
        """What dlogitsᵀ is multiplied by. The weight w goes into what is made anew: x where dlogits were kept."""
        return (w[:, None] * x if kept else x).to(h.dtype)

    found = Gradients(
        weight=_empty_like(head.weight) if needs.weight else None,
        bias=_empty_like(head.bias) if needs.bias else None,
        lora_B=_empty_like(head.lora_B) if needs.lora else None,
    )
    products = []  # (gradient [V, ·], factor [A, ·])
    if found.weight is not None:
        products.append((found.weight, factor(h)))
    if found.lora_B is not None and h_lora_A is not None:
        products.append((found.lora_B, factor(head.lora_scale * h_lora_A)))

    def work(columns: slice) -> None:
        if kept:
            dlogits = saved.unit_dlogits[:, columns]
        else:
            part = head.at(columns)
            raw = _raw_logits(h, h_lora_A, part)
            dlogits = raw if raw.dtype == h.dtype else padded(h, raw.shape[0], raw.shape[1])
            steps.block(raw, targets, part, columns.start, saved.normalizer, w, dlogits)
            del raw
        for gradient, beside in products:
            mm_into(gradient[columns], dlogits.t(), beside)
        if found.bias is not None:
            found.bias[columns] = _column_sums(dlogits, w if kept else None)

    parts = blocks(V, columns_at_a_time(h, V, min(budget, scratch_bytes(h.device)), kept=kept))
    in_parts(work, parts, alone=call.columns is None)
    return found


def _raw_logits(
    h: Tensor,  # [rows, D]
    h_lora_A: Tensor | None,  # [rows, r]
    head: Head,  # of some columns
    out: Tensor | None = None,  # [rows, columns]
) -> Tensor:
    """Products ``[rows, columns]`` in full precision; bias, scale and softcap belong to the steps."""
    if out is None:
        out = padded(h, len(h), len(head.weight), accumulation_dtype(h))
    raw = mm_float32(h, head.weight.t(), out)
    if h_lora_A is not None and head.lora_B is not None:
        raw.addmm_(h_lora_A, head.lora_B.t().to(raw.dtype), alpha=head.lora_scale)
    return raw


def _times_lora_A(
    h: Tensor,  # [rows, D]
    head: Head,
) -> Tensor | None:
    """``h·lora_Aᵀ [rows, r]`` in full precision."""
    return None if head.lora_A is None else mm_float32(h, head.lora_A.t())


def _times_head(
    dlogits: Tensor,  # [rows, V]
    call: LinearCall,
    saved: Saved,
    chunk: slice,
) -> None:
    """Fills these rows of what is saved: ``dlogits·lora_B`` and ``dlogits·(weight + lora_scale·lora_B·lora_A)``."""
    head, needs = call.head, call.needs
    low_rank = None
    if head.lora_B is not None:
        if needs.lora:
            low_rank = saved.unit_dlogits_lora_B[chunk]
            mm_into(low_rank, dlogits, head.lora_B)
        elif needs.hidden:
            low_rank = mm_float32(dlogits, head.lora_B)
    if needs.hidden:
        dhidden = saved.unit_dhidden[chunk]
        mm_into(dhidden, dlogits, head.weight)
        if low_rank is not None and head.lora_A is not None:
            dhidden.addmm_(low_rank, head.lora_A.to(dhidden.dtype), alpha=head.lora_scale)


def _gather(
    x: Tensor,  # [N, T, …]
    rows: Tensor,  # [rows] indices into N·T
    call: LinearCall,
) -> Tensor:
    return gathered(x, rows, bounded=call.max_active > 0)


def _column_sums(
    dlogits: Tensor,  # [A, columns]
    w: Tensor | None,  # [A]; None where dlogits contain it
) -> Tensor:
    """``Σ_rows w·dlogits`` in full precision."""
    total = torch.zeros(dlogits.shape[1], dtype=accumulation_dtype(dlogits), device=dlogits.device)
    for rows in blocks(len(dlogits), 64):  # of which there is a copy in full precision
        part = dlogits[rows].to(total.dtype)
        total += part.sum(0) if w is None else w[rows] @ part
    return total


def _kept_bytes(A: int, V: int, dtype: torch.dtype, scratch: int) -> int:
    """What keeping all dlogits takes; in half precision they do not replace the logits worked on."""
    return A * V * dtype.itemsize + (scratch if dtype in HALF else 0)


def _empty_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
