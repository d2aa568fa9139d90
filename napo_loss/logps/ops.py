"""The operators from logits: where an implementation is chosen, and what autograd and ``torch.compile`` know of it.

This file, ``linear_ops`` and ``sharded`` are the only ones of the room that reach the kernels, and only to launch one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, no_double_backward, uses_triton
from napo_loss.logps import eager
from napo_loss.logps.calls import LogitsCall

FORWARD = LogitsCall.signature("(Tensor, Tensor, Tensor)")
BACKWARD = LogitsCall.signature("Tensor", grad_sum="Tensor", lse="Tensor")
INPLACE = LogitsCall.signature("()", grad_sum="Tensor", lse="Tensor").replace("Tensor logits", "Tensor(a!) logits")


@torch.library.custom_op("napo_loss::sequence_logps", mutates_args=(), schema=FORWARD)
def sequence_logps(*values) -> tuple[Tensor, Tensor, Tensor]:
    """``sum [N]``, ``length [N]`` and, for the kernels' backward, ``lse [N, T]``; float32 (float64 for float64)."""
    call = LogitsCall.from_schema(*values)
    if uses_triton(call.backend, call.logits):
        from napo_loss.kernels.logps_forward import logps_forward
        from napo_loss.kernels.logps_reduce import logps_reduce
    else:
        logps_forward, logps_reduce = eager.logps_forward, eager.logps_reduce
    partials: Any = logps_forward(call.logits, call.labels, call.shift, call.ignore_index)
    return logps_reduce(partials, call.labels, call.token_weights, call.shift, call.ignore_index)


@sequence_logps.register_fake
def _(*values):
    call = LogitsCall.from_schema(*values)
    N, T, _ = call.logits.shape
    dtype = accumulation_dtype(call.logits)
    sums, lengths = (call.logits.new_empty(N, dtype=dtype) for _ in range(2))
    lse = call.logits.new_empty((N, T) if uses_triton(call.backend, call.logits) else (0,), dtype=dtype)
    return sums, lengths, lse


@torch.library.custom_op("napo_loss::sequence_logps_backward", mutates_args=(), schema=BACKWARD)
def sequence_logps_backward(grad_sum: Tensor, lse: Tensor, *values) -> Tensor:
    """``dlogits [N, T, V]`` in the dtype of the logits."""
    call = LogitsCall.from_schema(*values)
    dlogits = torch.empty_like(call.logits)
    _write_dlogits(dlogits, grad_sum, lse, call)
    return dlogits


@sequence_logps_backward.register_fake
def _(grad_sum, lse, *values):
    return torch.empty_like(LogitsCall.from_schema(*values).logits)


@torch.library.custom_op("napo_loss::sequence_logps_backward_", mutates_args=("logits",), schema=INPLACE)
def sequence_logps_backward_(grad_sum: Tensor, lse: Tensor, *values) -> None:
    """The same, written over the logits."""
    call = LogitsCall.from_schema(*values)
    _write_dlogits(call.logits, grad_sum, lse, call)


def _write_dlogits(dlogits: Tensor, grad_sum: Tensor, lse: Tensor, call: LogitsCall) -> None:
    if uses_triton(call.backend, call.logits):
        from napo_loss.kernels.logps_backward import logps_backward
    else:
        logps_backward = eager.logps_backward
    logps_backward(
        grad_sum, call.logits, call.labels, call.token_weights, lse, dlogits, call.shift, call.ignore_index
    )  # fmt: skip


def logits_gradient(
    grad_sum: Tensor,  # [N]
    lse: Tensor,  # [N, T], or empty: see the backend's backward
    call: LogitsCall,
) -> Tensor:
    """``dlogits [N, T, V]``, over the logits where the call asks for that."""
    if call.inplace_backward:
        sequence_logps_backward_(grad_sum, lse, **call.to_schema())
        return call.logits.detach()
    return sequence_logps_backward(grad_sum, lse, **call.to_schema())


def _setup_context(ctx, inputs, output):
    _, _, lse = output
    LogitsCall.save(ctx, inputs, lse=lse)


def _backward(ctx, grad_sum, grad_length, grad_lse):
    if grad_sum is None:
        return LogitsCall.gradients()
    call, outputs = LogitsCall.restore(ctx)
    return LogitsCall.gradients(logits=logits_gradient(grad_sum, outputs["lse"], call))


sequence_logps.register_autograd(_backward, setup_context=_setup_context)
sequence_logps_backward.register_autograd(no_double_backward)
