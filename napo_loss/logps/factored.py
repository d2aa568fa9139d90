"""Hidden states × lm_head to token log-probs, and its backward: which products, over which rows, in which order.

For any loss of log-probs ``dlogits = w·(onehot − softmax)``, with one ``w`` per row that only the backward pass knows.
So the forward pass goes through the active rows in chunks: logits, then ``D = onehot − softmax`` in their place, then
the unscaled gradient ``U = D·W``. Backward only rescales: ``dX = w ⊙ U``. ``dW = Dᵀ(w ⊙ X)`` comes from ``D`` where it
was kept, and otherwise from logits computed again, a block of the vocabulary at a time, so that each entry of ``dW`` is
one float32 sum, rounded once.

The two steps that are not matrix products come as functions: Triton kernels or plain tensor operations.
"""
# What `Needs` asks for is there, which pyright cannot follow:
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.gemm import HALF, blocks, mm_float32, mm_into

SCRATCH = {"cpu": 32 * 2**20, "gpu": 512 * 2**20}
"""Bytes of logits worked on at a time, where the budget allows: enough rows to keep the matrix products efficient."""


class Head(NamedTuple):
    """``z = softcap·tanh(x/softcap)``, ``x = scale·(h·(weight + lora_scale·B·A)ᵀ + bias)``; softcap 0: ``z = x``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    A: Tensor | None  # [r, D]
    B: Tensor | None  # [V, r]
    lora_scale: float
    scale: float
    softcap: float


class Needs(NamedTuple):
    """Whose gradient will be asked for."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool

    @property
    def columns(self) -> bool:
        """Whether backward needs D itself, not only U."""
        return self.weight or self.bias or self.lora

    @property
    def of_each(self) -> tuple[bool, ...]:
        """For ``hidden, weight, bias, A, B``: both factors of LoRA go together."""
        return *self, self.lora


class Steps(NamedTuple):
    rows: Callable[..., tuple[Tensor, Tensor]]
    """``(logits, head, targets, out) -> logp, lse``; writes D of whole rows into ``out``, unless it is None: then the
    logits stay as they are."""
    block: Callable[..., None]
    """``(logits, head, columns, targets, lse, w, out)``: writes ``w·D`` of some columns into ``out``."""
    reduce: Callable[[Tensor], Tensor] = lambda x: x
    """Adds what the other columns of a split vocabulary contribute, in place; here all columns are."""
    width: int | None = None
    """Columns by which rows are chunked, the same on every rank that exchanges something for each chunk; None: V."""


class Saved(NamedTuple):
    """What backward needs beside the arguments; empty tensors where it does not."""

    rows: Tensor  # [A] indices into N·T
    lse: Tensor  # [A]
    U: Tensor  # [A, D] float32: D·(W + s·B·A)
    DB: Tensor  # [A, r] float32: D·B
    D: Tensor  # [A, V] in the dtype of the factors, if kept


def forward(
    hidden: Tensor, head: Head, targets: Tensor, ignore_index: int, budget: int, needs: Needs, steps: Steps
) -> tuple[Tensor, Saved]:
    """``logp [N, T]``, 0 where masked. One host sync: the number of active rows."""
    (V, width), dtype = head.weight.shape, hidden.dtype
    rows = (targets.flatten() != ignore_index).nonzero().squeeze(1)
    A, scratch = len(rows), _scratch(hidden, budget)
    full = accumulation_dtype(hidden)
    keep = needs.columns and A * V * dtype.itemsize + (scratch if dtype in HALF else 0) <= budget
    needs_D = needs.hidden or needs.lora or keep

    def new(*shape, dtype=full):
        return hidden.new_empty(shape, dtype=dtype)

    logp, lse = new(A), new(A)
    U, DB = new(A if needs.hidden else 0, width), new(A if needs.lora else 0, 0 if head.B is None else head.B.shape[1])
    D = padded(hidden, A if keep else 0, V)
    for chunk in blocks(A, scratch // ((steps.width or V) * _logit_bytes(hidden))):
        X = _gather(hidden, rows[chunk])
        x = _logits(X, _low_rank(X, head), head, slice(0, V), out=D[chunk] if keep and dtype == full else None)
        # In full precision D replaces the logits; in half precision it is a matrix of its own.
        d = None
        if needs_D:
            d = x if dtype == full else D[chunk] if keep else padded(hidden, len(X), V)
        logp[chunk], lse[chunk] = steps.rows(x, head, targets.flatten()[rows[chunk]], d)
        del x
        if needs.lora:
            mm_into(DB[chunk], d, head.B)
        if needs.hidden:
            mm_into(U[chunk], d, head.weight)
            if head.A is not None:
                db = DB[chunk] if needs.lora else mm_float32(d, head.B)
                U[chunk].addmm_(db, head.A.to(full), alpha=head.lora_scale)
    out = logp.new_zeros(targets.numel())
    out[rows] = logp
    return out.view(targets.shape), Saved(rows, lse, U, DB, D)


def backward(
    grad: Tensor, hidden: Tensor, head: Head, targets: Tensor, saved: Saved, budget: int, needs: Needs, steps: Steps
) -> tuple[Tensor | None, ...]:
    """Gradients of ``hidden``, ``weight``, ``bias``, ``A`` and ``B`` from ``grad [N, T]``; None where not needed."""
    rows, w = saved.rows, grad.flatten()[saved.rows].to(saved.lse.dtype)
    grads: dict[str, Tensor | None] = dict.fromkeys(("hidden", "weight", "bias", "A", "B"))
    if needs.hidden:
        grads["hidden"] = dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        dhidden.view(-1, hidden.shape[-1])[rows] = steps.reduce(w[:, None] * saved.U).to(hidden.dtype)
    if not needs.columns:
        return tuple(grads.values())

    X = _gather(hidden, rows)
    V, kept = head.weight.shape[0], saved.D.numel() > 0
    target, XA = targets.flatten()[rows], _low_rank(X, head)
    if needs.lora:
        dA = steps.reduce(mm_float32((w[:, None] * saved.DB).t(), X.to(w.dtype)).mul_(head.lora_scale))
        grads["A"] = dA.to(head.A.dtype)
    for name, needed, like in (("weight", needs.weight, head.weight), ("bias", needs.bias, head.bias),
                               ("B", needs.lora, head.B)):  # fmt: skip
        if needed:
            grads[name] = torch.empty_like(like, memory_format=torch.contiguous_format)

    # w goes into the factor that is made anew: X where D was kept, D where it is recomputed.
    factors = {"weight": X, "B": head.lora_scale * XA if XA is not None and needs.lora else None}
    if kept:
        factors = {name: None if x is None else w[:, None] * x for name, x in factors.items()}
    factors = {name: None if x is None else x.to(X.dtype) for name, x in factors.items()}
    for columns in blocks(V, _columns(X, V, kept, _scratch(hidden, budget))):
        if kept:
            d = saved.D[:, columns]
        else:
            x = _logits(X, XA, head, columns)
            d = x if x.dtype == X.dtype else padded(X, *x.shape)
            steps.block(x, head, columns, target, saved.lse, w, d)
            del x
        for name, factor in factors.items():
            if (out := grads[name]) is not None:
                mm_into(out[columns], d.t(), factor)
        if (dbias := grads["bias"]) is not None:
            dbias[columns] = _column_sums(d, w if kept else None)
    return tuple(grads.values())


def _low_rank(X: Tensor, head: Head) -> Tensor | None:
    """``X·Aᵀ``, ``[rows, r]`` in full precision."""
    return None if head.A is None else mm_float32(X, head.A.t())


def _logits(X: Tensor, XA: Tensor | None, head: Head, columns: slice, out: Tensor | None = None) -> Tensor:
    """Raw products ``[rows, columns]`` in full precision; bias, scale and softcap belong to the steps."""
    weight = head.weight[columns].t()
    x = mm_float32(X, weight) if out is None else torch.mm(X, weight, out=out)
    if XA is not None:
        x.addmm_(XA, head.B[columns].t().to(x.dtype), alpha=head.lora_scale)
    return x


def _gather(hidden: Tensor, rows: Tensor) -> Tensor:
    T = hidden.shape[1]
    return hidden[rows // T, rows % T]


def padded(like: Tensor, rows: int, V: int) -> Tensor:
    """``[rows, V]`` with rows on aligned addresses, which matrix products and wide stores ask for."""
    return like.new_empty((rows, -(-V // 16) * 16))[:, :V]


def _column_sums(d: Tensor, w: Tensor | None) -> Tensor:
    """``Σ_rows w·d`` in full precision; ``w`` is already in ``d`` where None."""
    total = torch.zeros(d.shape[1], dtype=accumulation_dtype(d), device=d.device)
    for rows in blocks(len(d), 64):  # of which there is a copy in full precision
        part = d[rows].to(total.dtype)
        total += part.sum(0) if w is None else w[rows] @ part
    return total


def _columns(X: Tensor, V: int, kept: bool, scratch: int) -> int:
    """Columns of the vocabulary at a time: what is as large as they are wide must fit the scratch memory."""
    if kept:  # float32 results before they are rounded
        return V if X.dtype not in HALF else scratch // (4 * X.shape[1])
    return max(64, scratch // max(1, len(X) * _logit_bytes(X)))


def _logit_bytes(X: Tensor) -> int:
    """Of one logit while it is worked on: in full precision, and D beside it in half precision."""
    return accumulation_dtype(X).itemsize + X.element_size() * (X.dtype in HALF)


def scratch_bytes(device: torch.device) -> int:
    return SCRATCH["cpu" if device.type == "cpu" else "gpu"]


def _scratch(hidden: Tensor, budget: int) -> int:
    return min(budget, scratch_bytes(hidden.device))
