"""The operators from hidden states × lm_head, factored; see ``factored``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from napo_loss.backend import accumulation_dtype, no_double_backward, operator, uses_triton
from napo_loss.logps import eager, factored
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.memory import default_budget
from napo_loss.logps.records import Gradients, Saved, Steps
from napo_loss.logps.sharded import ShardedSteps

FORWARD = LinearCall.signature(f"({', '.join(['Tensor'] * (2 + len(Saved._fields)))})")
BACKWARD = LinearCall.signature(f"({', '.join(['Tensor'] * len(Gradients._fields))})", grad="Tensor", saved="Tensor[]")


@operator(FORWARD)
def linear_logps(*values) -> tuple[Tensor, ...]:
    """``logp [N, T]``, ``statistics [3, N, T]`` where they are asked for, and the tensors of
    :class:`napo_loss.logps.records.Saved`; see :class:`napo_loss.logps.factored.Forward`.
    """
    call = LinearCall.from_schema(*values)
    if not uses_triton(call.backend, call.hidden):
        V = call.columns.V if call.columns else call.head.weight.shape[0]
        eager.check_range(call.targets, V, call.ignore_index)
    with torch.autocast(call.hidden.device.type, enabled=False):
        found = factored.forward(call, _budget(call), _steps(call))
    return found.logp, found.statistics, *found.saved


@linear_logps.register_fake
def _(*values):
    call = LinearCall.from_schema(*values)
    active = call.max_active or _unknown_size(call.targets)
    kept = _unknown_size(call.targets) if call.needs.dlogits else 0
    rows = call.targets.new_empty(active, dtype=torch.int64)
    logp = call.hidden.new_empty(call.targets.shape, dtype=accumulation_dtype(call.hidden))
    statistics = logp.new_empty((3, *logp.shape) if call.token_statistics else 0)
    return logp, statistics, *Saved.empty(rows, call.hidden, call.head, call.needs, kept=kept)


def _unknown_size(targets: Tensor) -> int | torch.SymInt:
    """Rows that only values tell. Where there are no symbols for them (meta tensors, fake ones without shapes of their
    own), all positions."""
    if type(targets) is Tensor:
        return targets.numel()
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except DynamicOutputShapeException:
        return targets.numel()


@operator(BACKWARD)
def linear_logps_backward(grad: Tensor, saved: list[Tensor], *values) -> tuple[Tensor, ...]:
    """The tensors of :class:`napo_loss.logps.records.Gradients`; empty where not needed."""
    call = LinearCall.from_schema(*values)
    with torch.autocast(call.hidden.device.type, enabled=False):
        found = factored.backward(grad, call, Saved(*saved), _budget(call), _steps(call))
    return found.to_schema(call.hidden)


@linear_logps_backward.register_fake
def _(grad, saved, *values):
    call = LinearCall.from_schema(*values)
    head = call.head
    tensors = [call.hidden, head.weight, head.bias, head.lora_A, head.lora_B]
    asked = Gradients.from_schema(tensors, call.needs)
    like = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in asked]
    return Gradients(*like).to_schema(call.hidden)


def _budget(call: LinearCall) -> int:
    return call.budget or default_budget(call.hidden.device, shared=call.columns is not None)


def _steps(call: LinearCall) -> Steps:
    if uses_triton(call.backend, call.hidden):
        from napo_loss.kernels.linear_block import linear_block
        from napo_loss.kernels.linear_rows import linear_rows
    else:
        linear_rows, linear_block = eager.linear_rows, eager.linear_block
    if call.columns is None:
        return Steps(linear_rows, linear_block)
    return ShardedSteps(linear_rows, linear_block, call.columns)


def _setup_context(ctx, inputs, output):
    _, _, *saved = output
    LinearCall.save(ctx, inputs, **Saved(*saved)._asdict())


def _backward(ctx, grad, *_):
    if grad is None:
        return LinearCall.gradients()
    call, outputs = LinearCall.restore(ctx)
    found = linear_logps_backward(grad, list(Saved(**outputs)), **call.to_schema())
    return LinearCall.gradients(**Gradients.from_schema(found, call.needs)._asdict())


linear_logps.register_autograd(_backward, setup_context=_setup_context)
linear_logps_backward.register_autograd(no_double_backward)
