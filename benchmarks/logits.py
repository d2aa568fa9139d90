"""Sequence log-probs from logits: forward, backward and both, against what users would pick instead.

A provider maps ``logits [N, T, V], labels [N, T]`` (unshifted) to the sums ``[N]``. ``forward`` is training's: it
leaves what backward needs. ``backward`` runs on a graph that is kept; ``both`` is a step as a training loop makes it.
"""

# Peers are optional:
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.machine import cache_bytes
from benchmarks.measure import DEVICE, GPU, extra_bytes, in_fresh_process
from benchmarks.record import Row
from benchmarks.runner import Case, Timed, side_by_side
from benchmarks.shapes import Shape, logits_shapes
from napo_loss import reference, sequence_logps

DTYPE = torch.bfloat16
MOST = 64  # inputs: tiny ones stay in the cache instead of taking seconds to make
SECONDS = 0.1 if GPU else 0.2  # of measuring for each provider and part


def ours(logits: Tensor, labels: Tensor) -> Tensor:
    return sequence_logps(logits, labels).sum


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """The plain formula, as in most trainers."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return (logps * (labels != -100)).sum(-1)


def compiled(logits: Tensor, labels: Tensor) -> Tensor:
    # A graph that is kept may not lend its buffers; this formula saves none of a size worth lending.
    with functorch_config.patch(donated_buffer=False):
        return _compiled()(logits, labels)


@lru_cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(eager, dynamic=False, fullgraph=True)


def trl(logits: Tensor, labels: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    labels = labels[:, 1:]
    return (selective_log_softmax(logits[:, :-1], labels.clamp_min(0)) * (labels != -100)).sum(-1)


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Its Triton kernel, which is for old and reference log-probs: no gradient."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    if not GPU:
        raise RuntimeError("Liger's selective log-softmax is a Triton kernel: it needs a GPU")
    labels = labels[:, 1:]
    mask = labels != -100
    return fused_selective_log_softmax(logits.detach(), labels.clamp_min(0), 1.0, mask.int()).sum(-1)


def flash_attn(logits: Tensor, labels: Tensor) -> Tensor:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return _from_cross_entropy(CrossEntropyLoss(reduction="none"), logits, labels)


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return _from_cross_entropy(partial(cross_entropy, reduction="none"), logits, labels)


def _from_cross_entropy(loss: Callable, logits: Tensor, labels: Tensor) -> Tensor:
    """Over all rows, the labels moved instead of the logits: slicing those would copy them."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return -loss(logits.flatten(0, 1), targets.flatten()).view(labels.shape).sum(-1)


PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "napo_loss": ours,
    "eager": eager,
    "torch.compile": compiled,
    "TRL": trl,
    "Liger": liger,
    "flash-attn": flash_attn,
    "quack": quack,
}


def cases(quick: bool) -> Iterator[Case]:
    for i, shape in enumerate(logits_shapes(quick)):
        for c in shape.active:
            for what in ("forward", "backward", "both"):
                yield Case(
                    _row(shape, c, what),
                    tuple(PROVIDERS),
                    partial(_time, shape, c, what, 0.02 if quick else SECONDS),
                    partial(in_fresh_process, memory, shape, c) if what == "both" else None,
                    partial(errors, shape, c) if i == 0 and c == shape.active[-1] and what == "both" else None,
                )


def _row(shape: Shape, c: float, what: str) -> Row:
    """The floor: every active row is read once each way, and every row of the gradient written."""
    active = int((make_labels(shape, c)[:, 1:] != -100).sum())
    row_bytes = shape.V * DTYPE.itemsize
    written = shape.N * shape.T * row_bytes
    floor = {"forward": active * row_bytes, "backward": active * row_bytes + written}
    floor["both"] = sum(floor.values())
    return Row(
        "logits", shape.name, "", what, N=shape.N, T=shape.T, V=shape.V, dtype=str(DTYPE).removeprefix("torch."), c=c,
        active=active, floor_bytes=floor[what],
    )  # fmt: skip


def make_labels(shape: Shape, c: float) -> Tensor:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, shape.V, (shape.N, shape.T), generator=g)
    labels[:, : round((1 - c) * shape.T)] = -100
    return labels.to(DEVICE)


@lru_cache(1)
def make_logits(shape: Shape) -> list[Tensor]:
    """Inputs that are together larger than the cache, to rotate; ``do_bench`` clears it, so on a GPU one will do."""
    size = shape.N * shape.T * shape.V
    count = 1 if GPU else min(MOST, 1 + -(-cache_bytes() // (size * DTYPE.itemsize)))
    torch.manual_seed(0)
    return [torch.randn(shape.N, shape.T, shape.V, device=DEVICE, dtype=DTYPE) for _ in range(count)]


def _time(shape: Shape, c: float, what: str, seconds: float, providers: Sequence[str]) -> Timed:
    if what == "forward" and c == shape.active[0]:
        torch._dynamo.reset()  # each shape is compiled for itself, and past a limit dynamo would give up
    inputs, labels = make_logits(shape), make_labels(shape, c)
    return side_by_side(lambda name: start(PROVIDERS[name], inputs, labels, what), providers, seconds)


def start(provider: Callable, inputs: list[Tensor], labels: Tensor, what: str) -> Callable[[], object]:
    """The step to time, on the next of the inputs at every call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.linspace(-1, 1, labels.shape[0], device=DEVICE)  # dLoss/dsum: one number for each sequence
    if what == "forward":
        turn = cycle(leaves)
        return lambda: provider(next(turn), labels)
    if what == "backward":
        graphs = cycle([(_differentiable(provider(x, labels)), x) for x in leaves])
        return lambda: _backward(*next(graphs), grad, keep=True)
    turn = cycle(leaves)

    def both():
        x = next(turn)
        return _backward(_differentiable(provider(x, labels)), x, grad, keep=False)

    return both


def _differentiable(sums: Tensor) -> Tensor:
    if not sums.requires_grad:
        raise RuntimeError("it has no backward")
    return sums


def _backward(sums: Tensor, x: Tensor, grad: Tensor, keep: bool) -> Tensor:
    return torch.autograd.grad(sums, x, grad.to(sums.dtype), retain_graph=keep)[0]


def memory(shape: Shape, c: float, name: str) -> int:
    """Extra memory of forward and backward; the gradient is what they leave."""
    torch.manual_seed(0)
    logits = torch.randn(shape.N, shape.T, shape.V, device=DEVICE, dtype=DTYPE)
    step = start(PROVIDERS[name], [logits], make_labels(shape, c), "both")
    step()
    held = []
    return extra_bytes(lambda: held.append(step()), lambda: logits.nbytes)


def errors(shape: Shape, c: float, name: str) -> dict:
    """Against float64 of the same inputs, for two sequences; and whether a second run gives the same bits."""
    logits, labels = make_logits(shape)[0][:2].detach().requires_grad_(), make_labels(shape, c)[:2]
    grad = torch.linspace(-1, 1, labels.shape[0], device=DEVICE)
    runs = []
    for _ in range(2):
        sums = PROVIDERS[name](logits, labels)
        runs.append((sums.detach(), _backward(sums, logits, grad, keep=False)))
    (sums, found), (again, found_again) = runs
    exact_sums, exact = _exact(shape, c)
    return {
        "logps_error": (sums.double() - exact_sums).square().mean().sqrt().item(),
        "grad_error": ((found.double() - exact).norm() / exact.norm()).item(),
        "same_bits": torch.equal(sums, again) and torch.equal(found, found_again),
    }


@lru_cache(1)
def _exact(shape: Shape, c: float) -> tuple[Tensor, Tensor]:
    logits, labels = make_logits(shape)[0][:2].double().requires_grad_(), make_labels(shape, c)[:2]
    sums = reference.sequence_logps(logits, labels).sum
    return sums.detach(), _backward(sums, logits, torch.linspace(-1, 1, 2, device=DEVICE), keep=False)
