"""``napo_loss`` forward and backward where nothing but launches costs: a few floats, by the host's clock.

Inputs do not rotate: they are a few hundred bytes, which is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.measure import DEVICE
from benchmarks.record import Row
from benchmarks.runner import Case, Timed, scaled, side_by_side
from napo_loss import Negative, Recipe, napo_loss

BETA, ALPHA = 0.1, 0.01
SECONDS = 0.3  # of measuring for each provider


def ours(chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor]) -> Tensor:
    return napo_loss(chosen, rejected, *reference, beta=BETA, recipe=recipe(len(rejected))).losses


@lru_cache
def recipe(K: int) -> Recipe:
    return Recipe({str(k): Negative(alpha=ALPHA, weight=1 / K) for k in range(K)})


def eager(chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor]) -> Tensor:
    """As printed in the paper, with the rewards that every trainer logs beside the loss."""
    chosen_ratio, rejected_ratio = chosen - reference[0], rejected - reference[1]
    margin = chosen_ratio - rejected_ratio
    q = (2 * (1 - torch.sigmoid(ALPHA * margin.detach().mean(-1, keepdim=True)))).clamp(0.001, 1)
    losses = (1 - torch.sigmoid(BETA * margin) ** q) / q
    _rewards = BETA * chosen_ratio.detach(), BETA * rejected_ratio.detach()
    return losses.mean(0)  # the negatives share equally


@lru_cache
def compiled() -> Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]:
    return torch.compile(eager, dynamic=False, fullgraph=True)


PROVIDERS: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]] = {
    "napo_loss": ours,
    "eager": eager,
    "torch.compile": lambda *given: compiled()(*given),
}


def cases(quick: bool) -> Iterator[Case]:
    for K in (1, 3):
        for B in (1, 64) if quick else (1, 8, 64):
            yield Case(
                Row("objective", f"B={B}, K={K}", "", "both", unit="µs", N=B * (1 + K), dtype="float32"),
                tuple(PROVIDERS),
                partial(_time, B, K, 0.05 if quick else SECONDS),
                errors=partial(errors, B, K),
            )


def make_inputs(B: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-probs of answers of some 100 tokens, and a policy that has moved by some 10 nats."""
    g = torch.Generator().manual_seed(0)
    reference = (-200 + 30 * torch.randn(B, generator=g), -200 + 30 * torch.randn(K, B, generator=g))
    policy = [(x + 10 * torch.randn(x.shape, generator=g)).to(DEVICE, dtype).requires_grad_() for x in reference]
    chosen, rejected = (x.to(DEVICE, dtype) for x in reference)
    return policy[0], policy[1], (chosen, rejected)


def step(provider: Callable, inputs: tuple[Tensor, Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    losses = provider(*inputs)
    return losses.detach(), torch.autograd.grad(losses.mean(), inputs[:2])


def _time(B: int, K: int, seconds: float, providers: Sequence[str]) -> Timed:
    torch._dynamo.reset()  # each shape is compiled for itself
    inputs = make_inputs(B, K)
    timed = side_by_side(lambda name: partial(step, PROVIDERS[name], inputs), providers, seconds, host_clock=True)
    return scaled(timed, 1e3)


def errors(B: int, K: int, name: str) -> dict:
    exact_losses, exact = step(eager, make_inputs(B, K, torch.float64))
    losses, grads = step(PROVIDERS[name], make_inputs(B, K))
    found = torch.cat([g.flatten() for g in grads]).double()
    expected = torch.cat([g.flatten() for g in exact])
    return {
        "logps_error": (losses.double() - exact_losses).square().mean().sqrt().item(),
        "grad_error": ((found - expected).norm() / expected.norm()).item(),
    }
