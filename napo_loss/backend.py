"""Where an implementation is chosen, and what all operators share."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, ClassVar

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
    """Base of the records that carry an operator's arguments, named, through a schema, which holds flat values only.

    ``SCHEMA`` has the operator's arguments in order, name to type; ``to_schema`` gives their values by name, and
    ``from_schema`` makes the record of them again inside the operator.
    """

    SCHEMA: ClassVar[dict[str, str]]

    @classmethod
    def signature(cls, returns: str, **more: str) -> str:
        """The schema of an operator that takes the record, and ``more`` before it."""
        arguments = ", ".join(f"{type_} {name}" for name, type_ in {**more, **cls.SCHEMA}.items())
        return f"({arguments}) -> {returns}"

    @classmethod
    def named(cls, values: Iterable[Any]) -> dict[str, Any]:
        """An operator's values, which come by position, by their names."""
        return dict(zip(cls.SCHEMA, values, strict=True))

    @classmethod
    def gradients(cls, **found: Tensor | None) -> tuple[Tensor | None, ...]:
        """What autograd wants of a backward pass: one for each argument in the schema's order, by their names here."""
        if unknown := found.keys() - cls.SCHEMA.keys():
            raise TypeError(f"{cls.__name__} has no arguments {sorted(unknown)}")
        return tuple(found.get(name) for name in cls.SCHEMA)


def no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "the fused operators of napo_loss cannot be differentiated twice; for second derivatives use the "
        "functions of napo_loss.reference, which are plain autograd"
    )


def upcast(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))
