"""Hidden states × lm_head to the DPO loss: ours and what users would pick instead, behind one signature.

``provider(hidden, weight, labels)`` gives the reference-free DPO loss (β = 0.1) of ``[chosen; rejected]`` and, where it
has them, the sequence log-probs. A provider that is not installed or cannot run here says so by raising.
"""

# Peers are optional:
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import GPU
from napo_loss import linear_sequence_logps

BETA = 0.1
SMALLEST = 2**24  # bytes: the smallest budget that is measured


def dpo(sums: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = sums.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean(), sums


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def ours(hidden, weight, labels, budget: int | None = None):
    return dpo(linear_sequence_logps(hidden, weight, labels, logits_budget=budget).sum)


def eager(hidden, weight, labels):
    """TRL's DPO before its fused head, and nearly every other trainer's."""
    logits = F.linear(hidden, weight)[:, :-1].float()
    labels = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return dpo((logps * (labels != -100)).sum(-1))


@lru_cache
def compiled() -> Callable:
    return torch.compile(eager, dynamic=False, fullgraph=True)


def trl_fused_head(hidden, weight, labels):
    """The kernel of TRL's fused head, given the positions that its head gives it on this device."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, labels = hidden[:, :-1], labels[:, 1:]
    mask = labels != -100
    x = hidden[mask] if GPU else hidden.reshape(-1, hidden.shape[-1])
    y = labels[mask] if GPU else labels.clamp_min(0).reshape(-1)
    tail = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    logps = ChunkedLogProbFunction.apply(x, weight, None, y, *tail)[0]
    if GPU:
        logps = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
    return dpo((logps.view(mask.shape) * mask).sum(-1))


def liger(hidden, weight, labels, compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, average_log_prob=False, compiled=compiled)
    # One pair at a time, as it works by default; a batch is split into [chosen; rejected] by itself.
    value, (chosen, rejected, *_) = loss(weight, hidden[:, :-1], labels[:, 1:])
    return value, torch.cat([chosen, rejected])


def cut_cross_entropy(hidden, weight, labels, **options):
    from cut_cross_entropy import linear_cross_entropy

    if not GPU and "impl" not in options:
        raise RuntimeError("cut-cross-entropy's kernel needs a GPU")
    losses = linear_cross_entropy(hidden, weight, labels, shift=True, reduction="none", **options)
    return dpo(-losses.float().sum(-1))


def torch_linear_cross_entropy(hidden, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions()  # chunked: the memory-saving path; AttributeError before torch 2.13
    flat = hidden.flatten(0, 1), weight, shifted(labels).flatten()
    losses = F.linear_cross_entropy(*flat, reduction="none", options=options)
    return dpo(-losses.view(labels.shape).sum(-1))


def quack(hidden, weight, labels):
    from quack.linear_cross_entropy import linear_cross_entropy_func

    flat = hidden.flatten(0, 1), weight, None, shifted(labels).flatten()
    return dpo(-linear_cross_entropy_func(*flat, reduction="none").view(labels.shape).sum(-1))


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "napo_loss": ours,
    "napo_loss, 16 MiB": partial(ours, budget=SMALLEST),
    "eager": eager,
    "torch.compile": lambda *given: compiled()(*given),
    "TRL fused head": trl_fused_head,
    "Liger": partial(liger, compiled=False),
    "Liger, compiled": partial(liger, compiled=True),
    "CCE": partial(cut_cross_entropy, filter_eps="high"),
    "CCE, exact": partial(cut_cross_entropy, filter_eps=None),
    "CCE, compiled": partial(cut_cross_entropy, impl="torch_compile"),  # no kernel: its formula, of active rows
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "quack": quack,
}
