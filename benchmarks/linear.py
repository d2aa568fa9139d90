"""From hidden states through the DPO loss to the gradients of hidden states and lm_head, against users' other choices.

The floor is the products that this loss needs: forward, and for each gradient one more, over the positions that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_providers import PROVIDERS, dpo
from benchmarks.logits import MOST, make_labels
from benchmarks.machine import cache_bytes
from benchmarks.measure import DEVICE, GPU, extra_bytes, in_fresh_process
from benchmarks.record import Row
from benchmarks.runner import Case, Timed, side_by_side
from benchmarks.shapes import Shape, linear_accuracy_shape, linear_shapes
from napo_loss import reference

DTYPE = "bfloat16" if GPU else "float32"
SECONDS = 0.1 if GPU else 0.5  # of measuring for each provider
FROZEN = 0.3  # the active share at which a frozen head is measured


def cases(quick: bool) -> Iterator[Case]:
    accuracy = linear_accuracy_shape(quick)
    yield Case(_row(accuracy, 1.0, "accuracy", "bfloat16"), tuple(PROVIDERS), _untimed, None, partial(errors, accuracy))
    for i, shape in enumerate(linear_shapes(quick)):
        for c in shape.active:
            # A frozen head (LoRA) saves each provider its last product.
            for head in ("trained", "frozen") if i == 0 and c == FROZEN else ("trained",):
                yield Case(
                    _row(shape, c, head, DTYPE),
                    tuple(PROVIDERS) if head == "trained" else ("napo_loss", "eager"),
                    partial(_time, shape, c, head, 0.02 if quick else SECONDS),
                    partial(in_fresh_process, memory, shape, c, head),
                )


def _row(shape: Shape, c: float, what: str, dtype: str) -> Row:
    active = int((make_labels(shape, c)[:, 1:] != -100).sum())
    products = {"frozen": 2, "trained": 3}.get(what)
    flops = None if products is None else products * 2 * active * shape.D * shape.V
    return Row("linear", shape.name, "", what, **_sizes(shape), dtype=dtype, c=c, active=active, floor_flops=flops)


def _sizes(shape: Shape) -> dict[str, Any]:
    return {"N": shape.N, "T": shape.T, "D": shape.D, "V": shape.V}


def _untimed(providers: Sequence[str]) -> Timed:
    return {name: [] for name in providers}


def _time(shape: Shape, c: float, head: str, seconds: float, providers: Sequence[str]) -> Timed:
    if c == shape.active[0]:
        torch._dynamo.reset()  # each shape is compiled for itself, and past a limit dynamo would give up
    size = shape.D * shape.V * getattr(torch, DTYPE).itemsize
    count = 1 if GPU else min(MOST, 1 + -(-cache_bytes() // size))
    sets = make_inputs(shape, DTYPE, count)
    return side_by_side(lambda name: start(name, sets, make_labels(shape, c), head), providers, seconds)


@lru_cache(1)
def make_inputs(shape: Shape, dtype: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and heads, whose logits have a standard deviation of 3; ``count`` of them, to rotate."""
    N, T, D, V = shape[1:5]
    g = torch.Generator(DEVICE).manual_seed(0)
    kind = getattr(torch, dtype)
    return [
        (
            torch.randn(N, T, D, generator=g, device=DEVICE).to(kind),
            (torch.randn(V, D, generator=g, device=DEVICE) * (3 / D**0.5)).to(kind),
        )
        for _ in range(count)
    ]


def start(name: str, sets: list[tuple[Tensor, Tensor]], labels: Tensor, head: str) -> Callable[[], Any]:
    """``step()``, on the next of the inputs: log-probs of the sequences and gradients, of which nothing is kept."""
    turn = cycle([(x.detach().requires_grad_(), w.detach().requires_grad_(head != "frozen")) for x, w in sets])

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        x, w = next(turn)
        loss, sums = PROVIDERS[name](x, w, labels)
        return sums.detach(), torch.autograd.grad(loss, [t for t in (x, w) if t.requires_grad])

    return step


def memory(shape: Shape, c: float, head: str, name: str) -> int:
    """Extra memory of a step; the gradients are what it leaves."""
    step = start(name, make_inputs(shape, DTYPE, 1), make_labels(shape, c), head)
    step()
    held = []
    return extra_bytes(lambda: held.append(step()), lambda: sum(g.nbytes for g in held[0][1]))


def errors(shape: Shape, name: str) -> dict:
    """In bfloat16 against float64 of the same inputs; and whether a second run gives the same bits."""
    sets, labels = make_inputs(shape, "bfloat16", 1), make_labels(shape, 1.0)
    step = start(name, sets, labels, "trained")
    (sums, grads), (again, grads_again) = step(), step()
    total, exact = exact_step(shape)
    found = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, exact, strict=True)]
    same = torch.equal(sums, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    return {
        "logps_error": (sums.double() - total).square().mean().sqrt().item(),
        "grad_error": found[0],
        "weight_grad_error": found[1],
        "same_bits": same,
    }


@lru_cache(1)
def exact_step(shape: Shape) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log-probs and gradients in float64 of the bfloat16 inputs; the same for every provider."""
    hidden, weight = make_inputs(shape, "bfloat16", 1)[0]
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, sums = dpo(reference.linear_sequence_logps(x, w, make_labels(shape, 1.0)).sum)
    return sums.detach(), torch.autograd.grad(loss, [x, w])
