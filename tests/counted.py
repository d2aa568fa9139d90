"""What test_counted.py counts, in a process where kernels are for Triton's launcher, not its interpreter. None runs."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from napo_loss import SequenceLogps, backend, checks, linear_sequence_logps, napo_loss, sequence_logps
from napo_loss.logps import factored
from napo_loss.objective import loss as objective

BATCHES = 200
DTYPE, D = torch.bfloat16, 64


class Pointer:
    """A tensor without memory, as it lies in what PyTorch would allocate: at a boundary, from which views start off."""

    def __init__(self, x: Tensor):
        self.dtype, self.address = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self.address


def count_compilations(V: int) -> dict[str, int]:
    """Of each kernel, for steps of varied shapes: what Triton would compile anew, for one kind of GPU."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    binders, found = {}, defaultdict(set)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        args, named = map(as_pointer, args), {name: as_pointer(x) for name, x in kwargs.items()}
        _, specialization, options = binders[kernel](*args, **named)
        found[kernel.fn.__name__].add(str((specialization, options)))

    JITFunction.run = run
    rng = random.Random(0)
    for _ in range(BATCHES):
        N, T = 2 * rng.randint(1, 16), rng.randint(200, 1500)
        from_logits(N, T, V)
        from_hidden(N, int(T * rng.uniform(0.05, 0.4)), V, budget=rng.choice((2**28, 2**40)))
    return {name: len(keys) for name, keys in found.items()}


def as_pointer(x: Any) -> Any:
    return Pointer(x) if isinstance(x, Tensor) else x


def from_logits(N: int, T: int, V: int) -> None:
    """A training step: the policy forward and backward, the reference forward."""
    logits = torch.empty(N, T, V, dtype=DTYPE, device="meta", requires_grad=True)
    labels = torch.empty(N, T, dtype=torch.int64, device="meta")
    with torch.no_grad():
        reference = sequence_logps(logits, labels, backend="triton")
    loss(sequence_logps(logits, labels, backend="triton"), reference).backward()


def from_hidden(N: int, T: int, V: int, budget: int) -> None:
    """The same, of active positions, with a head that is trained: its dlogits are kept, or logits computed again."""
    hidden = torch.empty(N, T, D, dtype=DTYPE, device="meta", requires_grad=True)
    weight = torch.empty(V, D, dtype=DTYPE, device="meta", requires_grad=True)
    labels = torch.empty(N, T, dtype=torch.int64, device="meta")

    def logps():
        return linear_sequence_logps(hidden, weight, labels, shift=False, logits_budget=budget, backend="triton")

    with torch.no_grad():
        reference = logps()
    loss(logps(), reference).backward()


def loss(policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
    return napo_loss(*policy.pairs(), *reference.pairs()).losses.mean()


def count_operators() -> dict[str, int]:
    """What one step calls of PyTorch, by name."""
    JITFunction.run = lambda *_, **__: None
    logits = torch.randn(4, 8, 16, requires_grad=True)
    labels, reference = torch.zeros(4, 8, dtype=torch.int64), SequenceLogps(torch.zeros(4), torch.ones(4))

    def step():
        loss(sequence_logps(logits, labels, backend="triton"), reference).backward()

    step()  # what is made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return Counter(event.name for event in profile.events())


def gather(x: Tensor, rows: Tensor, _) -> Tensor:
    """What indexing gives; it takes long where there is no memory."""
    return x.new_empty((len(rows), *x.shape[2:]))


if __name__ == "__main__":
    objective._can_fuse = checks.interpreted = lambda *_: True  # or kernels would be refused without a GPU
    counted = {"operators": count_operators()}
    factored._gather = gather
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    # Tensors without memory have no autocast, and would be met by the operators' definitions instead of the kernels.
    torch.autocast, backend._watched = lambda *_, **__: nullcontext(), lambda _: False
    print(json.dumps({**counted, **{f"compilations {V}": count_compilations(V) for V in (128256, 50257)}}))
