"""Where an implementation is chosen, and what all operators share."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
"""A constant, because torch.compile cannot trace the look-up."""

NO_TRITON = (
    "this GPU path needs Triton, which CUDA builds of PyTorch on Linux bring along: pip install triton, "
    'or ask for the eager path with backend="eager"'
)


def uses_triton(backend: str, x: Tensor) -> bool:
    """Whether ``backend`` ("auto", "triton", "eager") means the kernels for this tensor."""
    if backend == "eager" or (backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return False
    if not HAS_TRITON:
        raise ImportError(NO_TRITON)
    return True


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Call:
    """Base of an operator's record. A schema holds tensors, numbers and flat lists; a record has their names on both sides.

    A subclass has ``to_schema()``, the operator's arguments by name, and ``from_schema(…)``, whose parameters are those
    of the operator, in its order. Nothing else calls the operator, or takes its arguments apart.
    """

    @classmethod
    def gradients(cls, **found: Tensor | None) -> tuple[Tensor | None, ...]:
        """What autograd wants of a backward pass: one for each argument in the schema's order, by their names here."""
        names = _parameters(cls)
        if unknown := found.keys() - set(names):
            raise TypeError(f"{cls.__name__} has no arguments {sorted(unknown)}")
        return tuple(found.get(name) for name in names)


@lru_cache
def _parameters(call: type[Call]) -> tuple[str, ...]:
    return tuple(inspect.signature(call.from_schema).parameters)  # pyright: ignore[reportAttributeAccessIssue]


def no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "the fused operators of napo_loss cannot be differentiated twice; for second derivatives use the "
        "functions of napo_loss.reference, which are plain autograd"
    )


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
