"""What a step takes the host beside its kernels: ``python -m benchmarks.host``, with every launch left out, on any CPU.

``sequence_logps → napo_loss → backward`` on tensors so small that only calls cost: with the operators called directly,
as they are outside ``torch.compile``, through PyTorch's dispatcher, and the plain formula. In time of this thread, so
that a busy machine counts less; the ratio says more than the microseconds, which are those of one processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from triton.runtime.jit import JITFunction

from benchmarks.logits import eager as eager_logps
from benchmarks.objective import eager as eager_losses
from napo_loss import backend, checks, napo_loss, sequence_logps
from napo_loss.objective import loss as objective

N, T, V = 4, 8, 16
STEPS, ROUNDS = 100, 40


def ours(logits: torch.Tensor, labels: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    policy = sequence_logps(logits, labels, backend="triton")
    return napo_loss(*policy.pairs(), *reference).losses


def eager(logits: torch.Tensor, labels: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    chosen, rejected = eager_logps(logits, labels).chunk(2)
    return eager_losses(chosen, rejected[None], (reference[0], reference[1][None]))


def step(losses: Callable[..., torch.Tensor], logits: torch.Tensor, *given) -> None:
    losses(logits, *given).mean().backward()
    logits.grad = None


def dispatched(*given) -> None:
    """A step for somebody who watches operators."""
    watched, backend._watched = backend._watched, lambda values: True
    try:
        step(ours, *given)
    finally:
        backend._watched = watched


def microseconds(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Of the quickest round, in turns."""
    found = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, run in steps.items():
            start = time.thread_time()
            for _ in range(STEPS):
                run()
            found[name] = min(found[name], (time.thread_time() - start) / STEPS * 1e6)
    return found


def main() -> None:
    JITFunction.run = lambda *_, **__: None
    objective._can_fuse = checks.interpreted = lambda *_: True  # or kernels would be refused without a GPU
    torch.set_num_threads(1)
    logits, labels = torch.randn(N, T, V, requires_grad=True), torch.zeros(N, T, dtype=torch.int64)
    given = logits, labels, (torch.zeros(N // 2), torch.zeros(N // 2))
    steps = {"directly": partial(step, ours), "by dispatch": dispatched, "plain formula": partial(step, eager)}
    found = microseconds({name: partial(run, *given) for name, run in steps.items()})
    for name, took in found.items():
        print(f"{name:14} {took:6.0f} µs {took / found['plain formula']:6.2f}")


if __name__ == "__main__":
    main()
