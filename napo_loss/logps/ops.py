"""The operators from logits: where an implementation is chosen, and what autograd and ``torch.compile`` know of it.

This file, ``linear_ops`` and ``sharded`` are the only ones of the room that reach the kernels, and only to launch one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, no_double_backward, operator, uses_triton
from napo_loss.logps import eager
from napo_loss.logps.calls import LogitsCall

FORWARD = LogitsCall.signature("(Tensor, Tensor, Tensor)")
SAVED = {"grad_sum": "Tensor", "normalizer": "Tensor"}
BACKWARD = LogitsCall.signature("Tensor", **SAVED)
INPLACE = LogitsCall.signature("()", **SAVED).replace("Tensor logits", "Tensor(a!) logits")


@operator(FORWARD)
def sequence_logps(*values) -> tuple[Tensor, Tensor, Tensor]:
    """``sum [N]``, ``length [N]`` and, for the kernels' backward, ``normalizer [2, N, T]``: float32 (float64 for
    float64). The last holds the peak of each row and its log-total: softmax = exp((x − peak) − log-total)."""
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
    kept = (2, N, T) if uses_triton(call.backend, call.logits) else (0,)
    return sums, lengths, call.logits.new_empty(kept, dtype=dtype)


@operator(BACKWARD)
def sequence_logps_backward(grad_sum: Tensor, normalizer: Tensor, *values) -> Tensor:
    """``dlogits [N, T, V]`` in the dtype of the logits."""
    call = LogitsCall.from_schema(*values)
    dlogits = torch.empty_like(call.logits)
    _write_dlogits(dlogits, grad_sum, normalizer, call)
    return dlogits


@sequence_logps_backward.register_fake
def _(grad_sum, normalizer, *values):
    return torch.empty_like(LogitsCall.from_schema(*values).logits)


@operator(INPLACE, mutates=("logits",))
def sequence_logps_backward_(grad_sum: Tensor, normalizer: Tensor, *values) -> None:
    """The same, written over the logits."""
    call = LogitsCall.from_schema(*values)
    _write_dlogits(call.logits, grad_sum, normalizer, call)
    torch.autograd.graph.increment_version(call.logits)  # autograd sees no kernel write


def _write_dlogits(dlogits: Tensor, grad_sum: Tensor, normalizer: Tensor, call: LogitsCall) -> None:
    if uses_triton(call.backend, call.logits):
        from napo_loss.kernels.logps_backward import logps_backward
    else:
        logps_backward = eager.logps_backward
    logps_backward(
        grad_sum, call.logits, call.labels, call.token_weights, normalizer, dlogits, call.shift, call.ignore_index
    )  # fmt: skip


def logits_gradient(
    grad_sum: Tensor,  # [N]
    normalizer: Tensor,  # [2, N, T], or empty: see the backend's backward
    call: LogitsCall,
) -> Tensor:
    """``dlogits [N, T, V]``, over the logits where the call asks for that."""
    if call.inplace_backward:
        sequence_logps_backward_(grad_sum, normalizer, **call.to_schema())
        return call.logits.detach()
    return sequence_logps_backward(grad_sum, normalizer, **call.to_schema())


def _setup_context(ctx, inputs, output):
    _, _, normalizer = output
    LogitsCall.save(ctx, inputs, normalizer=normalizer)


def _backward(ctx, grad_sum, *_):
    if grad_sum is None:
        return LogitsCall.gradients()
    call, outputs = LogitsCall.restore(ctx)
    return LogitsCall.gradients(logits=logits_gradient(grad_sum, outputs["normalizer"], call))


sequence_logps.register_autograd(_backward, setup_context=_setup_context)
sequence_logps_backward.register_autograd(no_double_backward)
