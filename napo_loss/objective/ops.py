"""The objective as custom operators: what autograd and ``torch.compile`` know of its kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import Call, no_double_backward
from napo_loss.objective import eager
from napo_loss.objective.estimators import BOUNDS
from napo_loss.objective.negatives import BatchLogps, PreferenceBatch
from napo_loss.objective.recipes import Recipe
from napo_loss.types import MIN_LENGTH

if TYPE_CHECKING:
    from napo_loss.kernels.objective_records import Outputs, Settings


class NegativeNumbers(NamedTuple):
    """The settings of K negatives as numbers, column by column: what a schema can hold, and a cache look up."""

    slope: tuple[float, ...]  # α, of the paper's estimator α·β; NaN for the moment estimator
    top: tuple[float, ...]  # q at a margin of -inf
    low: tuple[float, ...]  # the smallest q
    reads_mean: tuple[float, ...]  # 0 or 1
    fixed_q: tuple[float, ...]  # NaN where q is estimated
    weight: tuple[float, ...]

    @classmethod
    def of(cls, batch: PreferenceBatch, beta: float) -> NegativeNumbers:
        negatives = batch.negatives
        factors = {"released": 1.0, "paper": beta, "moment": math.nan}
        return cls(
            slope=tuple(float(n.alpha) * factors[n.estimator] for n in negatives),
            top=tuple(2.0 if n.estimator == "released" else 1.0 for n in negatives),
            low=tuple(BOUNDS[n.estimator][0] for n in negatives),
            reads_mean=tuple(float(batch.reads_mean(n)) for n in negatives),
            fixed_q=tuple(math.nan if n.q is None else float(n.q) for n in negatives),
            weight=tuple(float(n.weight) for n in negatives),
        )


@dataclass(frozen=True)
class ObjectiveCall(Call):
    """Everything the kernel computes with. ``means [3, K]``: those of all ranks, None where this rank's own count."""

    SCHEMA: ClassVar[dict[str, str]] = {
        "policy_chosen": "Tensor", "policy_rejected": "Tensor", "reference_chosen": "Tensor?",
        "reference_rejected": "Tensor?", "chosen_length": "Tensor?", "rejected_length": "Tensor?",
        "previous_moments": "Tensor?", "means": "Tensor?", "slope": "float[]", "top": "float[]", "low": "float[]",
        "reads_mean": "float[]", "fixed_q": "float[]",
        "weight": "float[]", "beta": "float", "sft_weight": "float", "decay": "float", "average": "bool",
        "dynamic": "bool",
    }  # fmt: skip

    logps: BatchLogps
    previous_moments: Tensor | None  # [2, K]
    means: Tensor | None
    negatives: NegativeNumbers
    beta: float
    sft_weight: float
    decay: float
    average: bool
    dynamic: bool

    @classmethod
    def of(
        cls, batch: PreferenceBatch, beta: float, recipe: Recipe, previous_moments: Tensor | None = None
    ) -> ObjectiveCall:
        return cls(
            batch.logps, previous_moments, None, NegativeNumbers.of(batch, beta), beta, float(recipe.sft_weight),
            float(recipe.decay), batch.average, batch.dynamic,
        )  # fmt: skip

    def with_means(self, means: Tensor) -> ObjectiveCall:
        return replace(self, means=means)

    def to_schema(self) -> dict[str, Any]:
        return {
            **self.logps._asdict(), "previous_moments": self.previous_moments, "means": self.means,
            **self.negatives._asdict(), "beta": self.beta, "sft_weight": self.sft_weight, "decay": self.decay,
            "average": self.average, "dynamic": self.dynamic,
        }  # fmt: skip

    @classmethod
    def from_schema(cls, *values: Any) -> ObjectiveCall:
        given = cls.named(values)
        logps = BatchLogps(*(given.pop(name) for name in BatchLogps._fields))
        negatives = NegativeNumbers(*(tuple(given.pop(name)) for name in NegativeNumbers._fields))
        return cls(logps=logps, negatives=negatives, **given)

    def launch(self, *, compute_loss: bool) -> Outputs:
        from napo_loss.kernels.objective import objective
        from napo_loss.kernels.objective_records import Constants, Switches

        constants = Constants(eager.MIN_Q, eager.WEIGHT_FLOOR, eager.WEIGHT_PRIOR, eager.MOST_GAIN, MIN_LENGTH)
        return objective(
            self.logps._asdict(), on_device(self.negatives, self.logps.policy_chosen.device), self.previous_moments,
            self.means, constants, Switches(self.average, self.dynamic, compute_loss), beta=self.beta,
            sft_weight=self.sft_weight, decay=self.decay,
        )  # fmt: skip


@lru_cache(maxsize=64)
def on_device(numbers: NegativeNumbers, device: torch.device) -> Settings:
    """Copied once, so that a training step has no host sync."""
    from napo_loss.kernels.objective_records import Settings

    return Settings(*torch.tensor(numbers, dtype=torch.float32, device=device).unbind())


@torch.library.custom_op("napo_loss::objective_means", mutates_args=(), schema=ObjectiveCall.signature("Tensor"))
def objective_means(*values: Any) -> Tensor:
    """``[3, K]``: the means of the margin behind q, of its square, and of the margin of the loss, for an all-reduce."""
    return ObjectiveCall.from_schema(*values).launch(compute_loss=False).means


@objective_means.register_fake
def _(*values):
    rejected = ObjectiveCall.from_schema(*values).logps.policy_rejected
    return rejected.new_empty((3, rejected.shape[0]), dtype=torch.float32)


class Objective(NamedTuple):
    """What the operator returns."""

    losses: Tensor  # [B]
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [K, B]
    q: Tensor  # [K]
    weights: Tensor  # [K]
    moments: Tensor  # [2, K]
    dlogps: Tensor  # [1 + K, B]: dloss_b/dlogπ


@torch.library.custom_op(
    "napo_loss::objective", mutates_args=(), schema=ObjectiveCall.signature(f"({', '.join(['Tensor'] * 7)})")
)
def objective(*values: Any) -> Objective:
    out = ObjectiveCall.from_schema(*values).launch(compute_loss=True)
    return Objective(out.losses, out.chosen_rewards, out.rejected_rewards, out.q, out.weights, out.moments, out.dlogps)


@objective.register_fake
def _(*values):
    rejected = ObjectiveCall.from_schema(*values).logps.policy_rejected
    K, B = rejected.shape

    def new(*shape):
        return rejected.new_empty(shape, dtype=torch.float32)

    return Objective(
        losses=new(B), chosen_rewards=new(B), rejected_rewards=new(K, B), q=new(K), weights=new(K), moments=new(2, K),
        dlogps=new(1 + K, B),
    )  # fmt: skip


@torch.library.custom_op("napo_loss::objective_backward", mutates_args=())
def objective_backward(dlogps: Tensor, grad_losses: Tensor) -> Tensor:
    """``[1 + K, B]``: the chain rule's last factor. An operator so that a second derivative is an error."""
    return dlogps * grad_losses


@objective_backward.register_fake
def _(dlogps, grad_losses):
    return torch.empty_like(dlogps)


objective_backward.register_autograd(no_double_backward)


def _objective_context(ctx, inputs, output):
    logps = ObjectiveCall.from_schema(*inputs).logps
    ctx.chosen_dtype, ctx.rejected_dtype = logps.policy_chosen.dtype, logps.policy_rejected.dtype
    ctx.save_for_backward(Objective(*output).dlogps)
    ctx.set_materialize_grads(False)


def _objective_backward(ctx, grad_losses, *_):
    if grad_losses is None:
        return ObjectiveCall.gradients()
    (dlogps,) = ctx.saved_tensors
    grads = objective_backward(dlogps, grad_losses)
    return ObjectiveCall.gradients(
        policy_chosen=grads[0].to(ctx.chosen_dtype), policy_rejected=grads[1:].to(ctx.rejected_dtype)
    )


objective.register_autograd(_objective_backward, setup_context=_objective_context)
