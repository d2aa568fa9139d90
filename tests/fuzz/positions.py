"""Cases of log-probs: arguments of ``sequence_logps`` and ``linear_sequence_logps``, made from a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .layouts import laid_out
from .references import predicted, sequences

PADDING = 3
"""Columns beyond the vocabulary where a shard is padded."""
OFFSETS = {"float32": 1e8, "bfloat16": 1e8, "float16": 3e4, "float64": 1e8}
TRAINED = {
    "all": ("hidden", "weight", "bias", "lora_A", "lora_B"), "hidden": ("hidden",), "weight": ("weight",),
    "bias": ("bias",), "lora": ("hidden", "lora_A", "lora_B"), "lora_A": ("lora_A",),
    "frozen_head": ("hidden", "lora_A", "lora_B", "bias"), "nothing": (),
}  # fmt: skip


@dataclass
class Positions:
    """Arguments, and what the labels say about them."""

    case: Case
    tensors: dict[str, Tensor]  # laid out; those that are trained require a gradient
    ignore: int
    ends: list[int]  # of the sequences, in flat positions
    at: Tensor = field(default_factory=lambda: torch.empty(0))  # [A] the positions that predict
    of: Tensor = field(default_factory=lambda: torch.empty(0))  # [A] the labels' own
    outside: int | None = None  # the sequence with a label that no vocabulary has
    values: dict[str, Tensor] = field(default_factory=dict)  # copies of the floating ones: these may be written over

    @property
    def N(self) -> int:
        return len(self.ends)

    @property
    def o(self) -> dict[str, Any]:
        return self.case.options

    @property
    def floating(self) -> dict[str, Tensor]:
        """What a gradient can be asked for."""
        names = ("logits", "hidden", "weight", "bias", "lora_A", "lora_B")
        return {name: self.tensors[name] for name in names if name in self.tensors}

    @property
    def computed(self) -> torch.dtype:
        """The dtype in which factors are multiplied: under autocast its own, but for float64."""
        given = self.tensors["hidden" if "hidden" in self.tensors else "logits"].dtype
        if self.o["call"] == "autocast" and "hidden" in self.tensors and given != torch.float64:
            return getattr(torch, self.o["autocast"])
        return given

    @property
    def work(self) -> torch.dtype:
        return torch.float64 if self.computed == torch.float64 else torch.float32

    @property
    def labels(self) -> Tensor:
        """Flat, of the positions ``of``."""
        return self.tensors["labels"].flatten()[self.of].long()

    @property
    def weights(self) -> Tensor:
        """Of the active positions, float64."""
        if "token_weights" not in self.tensors:
            return torch.ones(len(self.of), dtype=torch.float64)
        return self.tensors["token_weights"].flatten()[self.of].double()

    @property
    def member(self) -> Tensor:
        return sequences(self.of, self.ends)


def mask_of(kind: str, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """Which labels count."""
    N, T = shape
    counts = torch.ones(N, T, dtype=torch.bool)
    if kind == "some":
        counts = torch.rand(N, T, generator=g) < 0.6
    elif kind == "head":
        counts = torch.arange(T) >= torch.randint(0, T + 1, (N, 1), generator=g)
    elif kind == "one_all":
        counts[int(torch.randint(0, N, (), generator=g))] = False
    elif kind == "all":
        counts[:] = False
    return counts


def made(case: Case) -> Positions:
    o, g = case.options, torch.Generator().manual_seed(case.seed)
    N, T, V = o["N"], o["T"], o["V"]
    dtype = getattr(torch, o["dtype"])
    ignore = V - 1 if o["ignore_index"] == "last" else int(o["ignore_index"])
    labels = torch.randint(0, V, (N, T), generator=g).to(getattr(torch, o["labels_dtype"]))
    labels[~mask_of(o["mask"], (N, T), g)] = ignore
    found = Positions(case, {}, ignore, [T * (n + 1) for n in range(N)])
    if o["packed"]:
        cuts = torch.randint(0, N * T + 1, (N - 1,), generator=g).sort().values.tolist()
        found.ends = [*cuts, N * T]
        labels = labels.flatten()
        cu_seqlens = torch.tensor([0, *found.ends], dtype=getattr(torch, o["cu_dtype"]))
        found.tensors["cu_seqlens"] = cu_seqlens
    labels = laid_out(labels, o["labels_layout"])
    _locate(found, labels)
    if o["outside"] and len(found.of):
        where = found.of[int(torch.randint(0, len(found.of), (), generator=g))]
        flat = labels.clone(memory_format=torch.contiguous_format).flatten()
        flat[where] = V if V % 2 else -7
        labels = flat.view(labels.shape)
        found.outside = int(sequences(where[None], found.ends)[0])
    found.tensors["labels"] = labels
    if o["weights"] is not None:
        weights = torch.rand(labels.shape, generator=g)
        if o["weights"] == "zeros":
            weights = weights * (torch.rand(labels.shape, generator=g) < 0.5)
        elif o["weights"] == "signed":
            weights = 2 * weights - 1
        kind = dtype if o["weights_dtype"] == "same" else getattr(torch, o["weights_dtype"])
        found.tensors["token_weights"] = laid_out(weights.to(kind), o["weights_layout"])
    make = _hidden if "D" in o else _logits
    for name, x in make(found, tuple(labels.shape), g).items():
        x = laid_out(x.to(dtype), o[f"{name}_layout"]).detach()
        trained = o["trained"] if name == "logits" else name in TRAINED[o["trained"]]
        found.values[name] = x.clone(memory_format=torch.contiguous_format)
        found.tensors[name] = x.requires_grad_(bool(trained))
    return found


def _locate(found: Positions, labels: Tensor) -> None:
    found.at, found.of = predicted(labels.flatten(), shift=found.o["shift"], ignore=found.ignore, ends=found.ends)


def _logits(p: Positions, shape: tuple[int, ...], g: torch.Generator) -> dict[str, Tensor]:
    o, V = p.o, p.o["V"]
    columns = V + PADDING if o["shard"] == "padded" else V
    x = torch.randn((math.prod(shape), columns), generator=g, dtype=torch.float64)
    kind, A = o["values"], len(p.at)
    label = p.tensors["labels"].flatten()[p.of].long()
    if kind == "wide":
        x *= 30
    elif kind in ("offset", "minus_offset"):
        x += (1 if kind == "offset" else -1) * OFFSETS[o["dtype"]]
    elif kind == "constant":
        x.zero_()
    elif kind == "minus_inf":
        holes = torch.rand(x.shape, generator=g) < 0.3
        if p.outside is None:
            holes[p.at, label] = False
        holes[:, 0] = False
        x.masked_fill_(holes, -torch.inf)
    if A and kind in ("nan", "inf", "all_minus_inf", "label_minus_inf") and p.outside is None:
        one = int(torch.randint(0, A, (), generator=g))
        column = int(torch.randint(0, V, (), generator=g))
        row = x[p.at[one]]
        if kind == "all_minus_inf":
            row[:V] = -torch.inf
        elif kind == "label_minus_inf":
            row[label[one]] = -torch.inf
        else:
            row[column] = torch.nan if kind == "nan" else torch.inf
    _poison_masked(p, x)
    return {"logits": x.view(*shape, columns)}


def _hidden(p: Positions, shape: tuple[int, ...], g: torch.Generator) -> dict[str, Tensor]:
    o, V, D = p.o, p.o["V"], p.o["D"]
    rows = V + PADDING if o["shard"] == "padded" else V

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    hidden, kind = randn(math.prod(shape), D), o["values"]
    x = {"hidden": hidden, "weight": randn(rows, D) / D**0.5}
    if o["bias"]:
        x["bias"] = randn(rows)
    if o["lora"]:
        x |= {"lora_A": randn(o["lora"], D) / D**0.5, "lora_B": randn(rows, o["lora"])}
    if kind == "wide":
        hidden *= 8
    elif kind == "constant":
        x["weight"].zero_()
    elif kind == "whole":  # exact in every dtype, with ties
        x = {name: (2 * value).round().clamp(-3, 3) for name, value in x.items()}
        hidden = x["hidden"]
    elif kind == "offset":
        x["bias"] += 1e4
    elif kind == "nan" and len(p.at):
        hidden[p.at[int(torch.randint(0, len(p.at), (), generator=g))], 0] = torch.nan
    _poison_masked(p, hidden)
    x["hidden"] = hidden.view(*shape, D)
    return x


def _poison_masked(p: Positions, x: Tensor) -> None:
    if p.o["masked_nan"]:
        masked = torch.ones(len(x), dtype=torch.bool)
        masked[p.at] = False
        x[masked] = torch.nan


def upstream(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What the loss multiplies each result by, float64."""
    u = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).float().double()
    if kind == "zeros":
        u = u * (u > 0)
    elif kind == "ones":
        u = torch.ones_like(u)
    elif kind == "large":
        u = u * 1024
    return u


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
