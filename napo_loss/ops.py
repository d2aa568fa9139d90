"""Custom operators: where an implementation is chosen, and what autograd and ``torch.compile`` know of it.

This file and the other ``ops_*`` are the only ones that reach the kernels, and only when one is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from napo_loss import eager, formulas
from napo_loss.gemm import accumulation_dtype
from napo_loss.types import MIN_LENGTH

HAS_TRITON = find_spec("triton") is not None
"""A constant, because torch.compile cannot trace the look-up."""

NO_TRITON = (
    "this GPU path needs Triton, which CUDA builds of PyTorch on Linux bring along: pip install triton, "
    'or ask for the eager path with backend="eager"'
)


def uses_triton(backend: str, x: Tensor) -> bool:
    """Whether ``backend`` ("auto", "triton", "eager") means the kernels for this tensor."""
    if backend == "eager" or (backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return False
    if not HAS_TRITON:
        raise ImportError(NO_TRITON)
    return True


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


def no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "the fused operators of napo_loss cannot be differentiated twice; for second derivatives use the "
        "functions of napo_loss.reference, which are plain autograd"
    )


sequence_logps_backward.register_autograd(no_double_backward)


@lru_cache(maxsize=64)
def _settings(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The per-negative constants on the device: copied once, so that a training step has no host sync."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _launch_objective(logps, previous_q, means, settings, scalars, switches):
    from napo_loss.kernels.objective import Constants, objective

    K = logps[1].shape[0]
    values = _settings(tuple(settings), logps[0].device).view(4, K)
    constants = Constants(*formulas.Q_BOUNDS, formulas.MIN_Q, formulas.WEIGHT_FLOOR, MIN_LENGTH)
    return objective(logps, values, previous_q, means, tuple(scalars), constants, switches=switches)


@torch.library.custom_op("napo_loss::objective_means", mutates_args=())
def objective_means(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
    settings: Sequence[float],
    scalars: Sequence[float],
    average: bool,
) -> Tensor:
    """``[2, K]``: the mean margin behind q and the mean reward margin, for an all-reduce between the two halves."""
    logps = (
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_length, rejected_length
    )  # fmt: skip
    switches = {"AVERAGE": average, "DYNAMIC": False, "COMPUTE_LOSS": False}
    return _launch_objective(logps, None, None, settings, scalars, switches)[0]


@objective_means.register_fake
def _(policy_chosen, policy_rejected, *_):
    return policy_rejected.new_empty((2, policy_rejected.shape[0]), dtype=torch.float32)


@torch.library.custom_op("napo_loss::objective", mutates_args=())
def objective(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
    previous_q: Tensor | None,
    means: Tensor | None,
    settings: Sequence[float],
    scalars: Sequence[float],
    average: bool,
    dynamic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses ``[B]``, rewards ``[B]`` and ``[K, B]``, q ``[K]``, weights ``[K]``, and ``grads [1 + K, B]``.

    ``settings``: see :func:`napo_loss.negatives.flat_settings`. ``scalars``: β, SFT weight, decay.
    """
    logps = (
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_length, rejected_length
    )  # fmt: skip
    switches = {"AVERAGE": average, "DYNAMIC": dynamic, "COMPUTE_LOSS": True}
    _, *outputs = _launch_objective(logps, previous_q, means, settings, scalars, switches)
    losses, chosen_rewards, rejected_rewards, q, weights, grads = outputs
    return losses, chosen_rewards, rejected_rewards, q, weights, grads


@objective.register_fake
def _(policy_chosen, policy_rejected, *_):
    K, B = policy_rejected.shape
    shapes = ((B,), (B,), (K, B), (K,), (K,), (1 + K, B))
    return tuple(policy_rejected.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("napo_loss::objective_backward", mutates_args=())
def objective_backward(grads: Tensor, grad_losses: Tensor) -> Tensor:
    """``[1 + K, B]``: the chain rule's last factor. An operator so that a second derivative is an error."""
    return grads * grad_losses


@objective_backward.register_fake
def _(grads, grad_losses):
    return torch.empty_like(grads)


objective_backward.register_autograd(no_double_backward)


def _objective_context(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(output[5])
    ctx.set_materialize_grads(False)


def _objective_backward(ctx, grad_losses, *_):
    if grad_losses is None:
        return (None,) * 12
    (grads,) = ctx.saved_tensors
    grads = objective_backward(grads, grad_losses)
    return grads[0].to(ctx.dtypes[0]), grads[1:].to(ctx.dtypes[1]), *(None,) * 10


objective.register_autograd(_objective_backward, setup_context=_objective_context)
