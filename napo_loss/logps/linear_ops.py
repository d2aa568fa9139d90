"""The linear path as custom operators: hidden states × lm_head to token log-probs, factored; see ``factored``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, no_double_backward, uses_triton
from napo_loss.logps import eager, factored
from napo_loss.logps.factored import Head, Needs, Saved, Steps
from napo_loss.logps.sharded import sharded
from napo_loss.parallel.columns import Columns


def _kernel_rows(logits: Tensor, head: Head, targets: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    from napo_loss.kernels.linear_rows import linear_rows

    return linear_rows(logits, head.bias, head.scale, head.softcap, targets, out)


def _kernel_block(
    logits: Tensor, head: Head, columns: slice, targets: Tensor, lse: Tensor, w: Tensor, out: Tensor
) -> None:
    from napo_loss.kernels.linear_block import linear_block

    bias = None if head.bias is None else head.bias[columns]
    linear_block(logits, bias, head.scale, head.softcap, columns.start, targets, (lse, w), out)


KERNELS = Steps(_kernel_rows, _kernel_block)
EAGER = Steps(eager.linear_rows, eager.linear_block)


def _steps(backend: str, x: Tensor, columns: Sequence[int], group: str) -> Steps:
    steps = KERNELS if uses_triton(backend, x) else EAGER
    return sharded(steps, Columns.of(columns, group)) if columns else steps


def _budget(given: int, device: torch.device, *, shared: bool) -> int:
    """Default: a quarter of a GPU's free memory (what PyTorch holds unused is free), an eighth of a CPU's.

    ``shared`` with ranks that must form the same chunks: enough for a full scratch, whatever is free here.
    """
    if given:
        return given
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        found = (torch.cuda.mem_get_info(device)[0] + unused) // 4
    else:
        try:
            found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
        except (ValueError, OSError, AttributeError):  # not every system says
            found = 2**30
    return max(found, factored.scratch_bytes(device)) if shared else found


@torch.library.custom_op("napo_loss::linear_logps", mutates_args=())
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    targets: Tensor,
    scalars: Sequence[float],
    ignore_index: int,
    budget: int,
    needs: Sequence[bool],
    backend: str,
    columns: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``logp [N, T]`` and the five tensors of :class:`napo_loss.factored.Saved`.

    ``scalars``: LoRA scale, logit scale, softcap. ``budget``: 0 for the default. ``needs``:
    :class:`napo_loss.factored.Needs`, as an operator runs below autograd and cannot see it. ``columns`` and ``group``:
    :class:`napo_loss.vocabulary.Columns`, empty where the whole vocabulary is here.
    """
    head = Head(weight, bias, A, B, *scalars)
    steps = _steps(backend, hidden, columns, group)
    if not uses_triton(backend, hidden):
        V = Columns.of(columns, group).V if columns else weight.shape[0]
        eager.check_range(targets, V, ignore_index)
    budget = _budget(budget, hidden.device, shared=bool(columns))
    with torch.autocast(hidden.device.type, enabled=False):
        logp, (rows, lse, U, DB, D) = factored.forward(
            hidden, head, targets, ignore_index, budget, Needs(*needs), steps
        )
    return logp, rows, lse, U, DB, D


@linear_logps.register_fake
def _(hidden, weight, bias, A, B, targets, scalars, ignore_index, budget, needs, backend, columns, group):
    need, (V, width) = Needs(*needs), weight.shape
    dtype = accumulation_dtype(hidden)
    rows, kept = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        targets.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((rows if need.hidden else 0, width), dtype=dtype),
        hidden.new_empty((rows if need.lora else 0, 0 if B is None else B.shape[1]), dtype=dtype),
        factored.padded(hidden, kept, V),
    )


@torch.library.custom_op("napo_loss::linear_logps_backward", mutates_args=())
def linear_logps_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    targets: Tensor,
    saved: Sequence[Tensor],
    scalars: Sequence[float],
    budget: int,
    needs: Sequence[bool],
    backend: str,
    columns: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``hidden, weight, bias, A, B``; empty where not needed."""
    head = Head(weight, bias, A, B, *scalars)
    steps = _steps(backend, hidden, columns, group)
    budget = _budget(budget, hidden.device, shared=bool(columns))
    with torch.autocast(hidden.device.type, enabled=False):
        grads = factored.backward(grad, hidden, head, targets, Saved(*saved), budget, Needs(*needs), steps)
    hidden_grad, weight_grad, bias_grad, A_grad, B_grad = (hidden.new_empty(0) if x is None else x for x in grads)
    return hidden_grad, weight_grad, bias_grad, A_grad, B_grad


@linear_logps_backward.register_fake
def _(grad, hidden, weight, bias, A, B, targets, saved, scalars, budget, needs, backend, columns, group):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias, A, B), Needs(*needs).of_each, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, targets, ctx.scalars, _, ctx.budget, ctx.needs, ctx.backend, ctx.columns, ctx.group = inputs
    ctx.save_for_backward(*tensors, targets, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    *arguments, targets = ctx.saved_tensors[:6]
    saved = list(ctx.saved_tensors[6:])
    grads = linear_logps_backward(
        grad, *arguments, targets, saved, ctx.scalars, ctx.budget, ctx.needs, ctx.backend, ctx.columns, ctx.group
    )  # fmt: skip
    asked = Needs(*ctx.needs).of_each
    return *(x if needed else None for x, needed in zip(grads, asked, strict=True)), *(None,) * 8


linear_logps.register_autograd(_backward, setup_context=_setup_context)
linear_logps_backward.register_autograd(no_double_backward)
