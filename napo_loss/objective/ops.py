"""The objective as custom operators: what autograd and ``torch.compile`` know of its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from napo_loss.backend import no_double_backward
from napo_loss.objective import eager
from napo_loss.objective.estimators import Q_BOUNDS
from napo_loss.types import MIN_LENGTH


@lru_cache(maxsize=64)
def _settings(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The per-negative constants on the device: copied once, so that a training step has no host sync."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _launch_objective(logps, previous_q, means, settings, scalars, switches):
    from napo_loss.kernels.objective import Constants, objective

    K = logps[1].shape[0]
    values = _settings(tuple(settings), logps[0].device).view(4, K)
    constants = Constants(*Q_BOUNDS, eager.MIN_Q, eager.WEIGHT_FLOOR, MIN_LENGTH)
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
