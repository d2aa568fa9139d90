"""The objective as custom operators: what autograd and ``torch.compile`` know of its kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import Call, by_name, no_double_backward, operator
from napo_loss.objective import eager
from napo_loss.objective.estimators import BOUNDS
from napo_loss.objective.negatives import BatchLogps, PreferenceBatch
from napo_loss.objective.recipes import Recipe
from napo_loss.types import MIN_LENGTH

NONE = -1.0
"""No slope, or no q. Not NaN: two of these differ, so that a cache would never find them."""


class NegativeNumbers(NamedTuple):
    """The settings of K negatives as numbers, column by column: what a schema can hold, and a cache look up."""

    slope: tuple[float, ...]  # α, of the paper's estimator α·β; NONE for the moment estimator
    top: tuple[float, ...]  # q at a margin of -inf
    low: tuple[float, ...]  # the smallest q
    reads_mean: tuple[float, ...]  # 0 or 1
    fixed_q: tuple[float, ...]  # NONE where q is estimated
    weight: tuple[float, ...]

    @classmethod
    def of(cls, batch: PreferenceBatch, beta: float) -> NegativeNumbers:
        negatives = batch.negatives
        factors = {"released": 1.0, "paper": beta}
        return cls(
            slope=tuple(float(n.alpha) * factors[n.estimator] if n.estimator in factors else NONE for n in negatives),
            top=tuple(2.0 if n.estimator == "released" else 1.0 for n in negatives),
            low=tuple(BOUNDS[n.estimator][0] for n in negatives),
            reads_mean=tuple(float(batch.reads_mean(n)) for n in negatives),
            fixed_q=tuple(NONE if n.q is None else float(n.q) for n in negatives),
            weight=tuple(float(n.weight) for n in negatives),
        )


@dataclass(frozen=True)
class ObjectiveCall(Call):
    """Everything the kernel computes with. ``means [3, K]``: those of all ranks, None where this rank's own count."""

    SCHEMA: ClassVar[dict[str, str]] = {
        "policy_chosen": "Tensor", "policy_rejected": "Tensor", "reference_chosen": "Tensor?",
        "reference_rejected": "Tensor?", "chosen_length": "Tensor?", "rejected_length": "Tensor?",
        "pair_mask": "Tensor?", "previous_moments": "Tensor?", "means": "Tensor?", "slope": "float[]", "top": "float[]",
        "low": "float[]", "reads_mean": "float[]", "fixed_q": "float[]", "weight": "float[]", "beta": "float",
        "sft_weight": "float", "decay": "float", "average": "bool", "dynamic": "bool",
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
            **by_name(self.logps, BatchLogps), "previous_moments": self.previous_moments, "means": self.means,
            **by_name(self.negatives, NegativeNumbers), "beta": self.beta, "sft_weight": self.sft_weight,
            "decay": self.decay, "average": self.average, "dynamic": self.dynamic,
        }  # fmt: skip

    @classmethod
    def from_schema(cls, *values: Any) -> ObjectiveCall:
        given = cls.named(values)
        logps = BatchLogps(*(given.pop(name) for name in BatchLogps._fields))
        negatives = NegativeNumbers(*(tuple(given.pop(name)) for name in NegativeNumbers._fields))
        return cls(logps=logps, negatives=negatives, **given)

    def launch(self, means: Tensor | None, out: Objective | None) -> None:
        """Writes ``out``, with ``means`` where they are given; without ``out`` it writes ``means``."""
        from napo_loss.kernels.objective import objective
        from napo_loss.kernels.objective_records import Constants

        constants = Constants(eager.MIN_Q, eager.WEIGHT_FLOOR, eager.WEIGHT_PRIOR, eager.MOST_GAIN, MIN_LENGTH)
        objective(
            self.logps._asdict(), on_device(self.negatives, self.logps.policy_chosen.device), self.previous_moments,
            means, None if out is None else out._asdict(), constants, average=self.average, dynamic=self.dynamic,
            beta=self.beta, sft_weight=self.sft_weight, decay=self.decay,
        )  # fmt: skip

    def new(self, *shape: int | torch.SymInt) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.logps.policy_chosen.device)


@lru_cache(maxsize=64)
def on_device(numbers: NegativeNumbers, device: torch.device) -> Tensor:
    """``[6, K]``, copied once, so that a training step has no host sync."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@operator(ObjectiveCall.signature("Tensor"))
def objective_means(*values: Any) -> Tensor:
    """``[3, K]``: the means of the margin behind q, of its square, and of the margin of the loss, for an all-reduce."""
    call = ObjectiveCall.from_schema(*values)
    means = call.new(3, call.logps.policy_rejected.shape[0])
    call.launch(means, None)
    return means


@objective_means.register_fake
def _(*values):
    call = ObjectiveCall.from_schema(*values)
    return call.new(3, call.logps.policy_rejected.shape[0])


class Objective(NamedTuple):
    """What the operator returns, float32: the chosen come before their negatives."""

    losses: Tensor  # [B]
    rewards: Tensor  # [1 + K, B]
    dlogps: Tensor  # [1 + K, B]: dloss_b/dlogπ
    found: Tensor  # [4, K]: q, weights and the two moments

    @classmethod
    def empty(cls, call: ObjectiveCall) -> Objective:
        K, B = call.logps.policy_rejected.shape
        return cls(call.new(B), call.new(1 + K, B), call.new(1 + K, B), call.new(4, K))


@operator(ObjectiveCall.signature("(Tensor, Tensor, Tensor, Tensor)"))
def objective(*values: Any) -> Objective:
    call = ObjectiveCall.from_schema(*values)
    out = Objective.empty(call)
    call.launch(call.means, out)
    return out


@objective.register_fake
def _(*values):
    return Objective.empty(ObjectiveCall.from_schema(*values))


@operator("(Tensor dlogps, Tensor grad_losses) -> Tensor")
def objective_backward(dlogps: Tensor, grad_losses: Tensor) -> Tensor:
    """``[1 + K, B]``: the chain rule's last factor. An operator so that a second derivative is an error."""
    return dlogps * grad_losses


@objective_backward.register_fake
def _(dlogps, grad_losses):
    return torch.empty_like(dlogps)


objective_backward.register_autograd(no_double_backward)


def _objective_context(ctx, inputs, output):
    given = ObjectiveCall.named(inputs)
    ctx.chosen_dtype, ctx.rejected_dtype = given["policy_chosen"].dtype, given["policy_rejected"].dtype
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
