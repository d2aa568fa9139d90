"""Custom operators: where an implementation is chosen, and what autograd and ``torch.compile`` know of it.

This file and the other ``ops_*`` are the only ones that reach the kernels, and only when one is launched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype, no_double_backward, uses_triton
from napo_loss.logps import eager


@torch.library.custom_op("napo_loss::sequence_logps", mutates_args=())
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    shift: int,
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum [N]``, ``length [N]`` and, for the kernels' backward, ``lse [N, T]``; float32 (float64 for float64)."""
    if not uses_triton(backend, logits):
        sums, lengths = eager.logps_forward(logits, labels, token_weights, shift, ignore_index)
        return sums, lengths, sums.new_empty(0)
    from napo_loss.kernels.logps_forward import logps_forward
    from napo_loss.kernels.logps_reduce import logps_reduce

    partials = logps_forward(logits, labels, shift, ignore_index)
    return logps_reduce(partials, labels, token_weights, shift, ignore_index)


@sequence_logps.register_fake
def _(logits, labels, token_weights, shift, ignore_index, inplace_backward, backend):
    N, T, _ = logits.shape
    lse_shape = (N, T) if uses_triton(backend, logits) else (0,)
    return tuple(logits.new_empty(x, dtype=accumulation_dtype(logits)) for x in (N, N, lse_shape))


@torch.library.custom_op("napo_loss::sequence_logps_backward", mutates_args=())
def sequence_logps_backward(
    grad_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    lse: Tensor,
    shift: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """``dlogits [N, T, V]`` in the dtype of the logits."""
    grad = torch.empty_like(logits)
    _write_grad(grad_sum, logits, labels, token_weights, lse, grad, shift, ignore_index, backend)
    return grad


@sequence_logps_backward.register_fake
def _(grad_sum, logits, labels, token_weights, lse, shift, ignore_index, backend):
    return torch.empty_like(logits)


@torch.library.custom_op("napo_loss::sequence_logps_backward_", mutates_args=("logits",))
def sequence_logps_backward_(
    grad_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    lse: Tensor,
    shift: int,
    ignore_index: int,
    backend: str,
) -> None:
    """The same, written over the logits."""
    _write_grad(grad_sum, logits, labels, token_weights, lse, logits, shift, ignore_index, backend)


def _write_grad(grad_sum, logits, labels, token_weights, lse, grad, shift, ignore_index, backend):
    if uses_triton(backend, logits):
        from napo_loss.kernels.logps_backward import logps_backward

        logps_backward(grad_sum, logits, labels, token_weights, lse, grad, shift, ignore_index)
    else:
        eager.logps_backward(grad_sum, logits, labels, token_weights, lse, grad, shift, ignore_index)


def _setup_context(ctx, inputs, output):
    logits, labels, token_weights, ctx.shift, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, token_weights, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_sum, grad_length, grad_lse):
    logits, labels, token_weights, lse = ctx.saved_tensors
    if grad_sum is None:
        return (None,) * 7
    args = (grad_sum, logits, labels, token_weights, lse, ctx.shift, ctx.ignore_index, ctx.backend)
    if ctx.inplace:
        sequence_logps_backward_(*args)
        grad = logits.detach()
    else:
        grad = sequence_logps_backward(*args)
    return grad, None, None, None, None, None, None


sequence_logps.register_autograd(_backward, setup_context=_setup_context)


sequence_logps_backward.register_autograd(no_double_backward)
