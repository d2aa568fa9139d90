"""Ways a tensor may lie in memory. What lies between its elements is poison: NaN, or a label that no vocabulary has."""

from __future__ import annotations

import torch
from torch import Tensor

POISON = 10**6


def poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan if like.is_floating_point() else POISON, dtype=like.dtype)


def interleaved(x: Tensor) -> Tensor:
    """Every other element of a larger tensor."""
    larger = poisoned((*x.shape[:-1], 2 * x.shape[-1]), x)
    larger[..., ::2] = x
    return larger[..., ::2]


def transposed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """The inside of a larger tensor, with something before and after each row."""
    larger = poisoned(tuple(size + 3 for size in x.shape), x)
    inside = larger[tuple(slice(1, 1 + size) for size in x.shape)]
    return inside.copy_(x)


def offset(x: Tensor) -> Tensor:
    """Contiguous, from an address that no wide load may start at."""
    larger = poisoned((x.numel() + 1,), x)
    return larger[1:].view(x.shape).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first row for all: of one element in memory along the first dimension."""
    return x[:1].clone().expand(x.shape)


LAYOUTS = [interleaved, transposed, sliced, offset, expanded]
BY_NAME = {"dense": lambda x: x, **{f.__name__: f for f in LAYOUTS}}


def laid_out(x: Tensor, name: str) -> Tensor:
    """``x`` in the layout of that name; a number has none."""
    return BY_NAME[name](x) if x.dim() else x
