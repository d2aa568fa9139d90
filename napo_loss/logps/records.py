"""The records of the path from hidden states: the head, whose gradients are asked for, and what forward leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.gemm import padded
from napo_loss.parallel.columns import Rows
from napo_loss.types import LowRank


class Head(NamedTuple):
    """An lm_head and what is done to its products: to raw logits ``h·(weight + lora_scale·lora_B·lora_A)ᵀ``.

    ``z = softcap·tanh(y/softcap)``, ``y = logit_scale·(raw + bias)``; softcap 0: ``z = y``.
    """

    SCHEMA = {  # noqa: RUF012, a NamedTuple cannot say ClassVar
        "weight": "Tensor", "bias": "Tensor?", "lora_A": "Tensor?", "lora_B": "Tensor?", "lora_scale": "float",
        "logit_scale": "float", "softcap": "float",
    }  # fmt: skip

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_A: Tensor | None  # [r, D]
    lora_B: Tensor | None  # [V, r]
    lora_scale: float
    logit_scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        weight: Tensor | LowRank,  # [V, D]
        bias: Tensor | None = None,  # [V]
        *,
        logit_scale: float | None = None,
        softcap: float | None = None,
    ) -> Head:
        """From what callers have; ``None`` where nothing is done."""
        head = weight if isinstance(weight, LowRank) else None
        return cls(
            weight=weight.weight if isinstance(weight, LowRank) else weight,
            bias=bias,
            lora_A=head.lora_A if head else None,
            lora_B=head.lora_B if head else None,
            lora_scale=head.scale if head else 1.0,
            logit_scale=logit_scale or 1.0,
            softcap=softcap or 0.0,
        )

    def to(self, dtype: torch.dtype) -> Head:
        """The factors in ``dtype``, as a linear layer has them under autocast; the bias is added in full precision."""
        lora_A = None if self.lora_A is None else self.lora_A.to(dtype)
        lora_B = None if self.lora_B is None else self.lora_B.to(dtype)
        # Not _replace, which torch.compile does not trace before 2.9.
        return Head(
            self.weight.to(dtype), self.bias, lora_A, lora_B, self.lora_scale, self.logit_scale, self.softcap
        )  # fmt: skip

    def at(self, columns: slice) -> Head:
        """The head of these columns of the vocabulary."""
        return self._replace(
            weight=self.weight[columns],
            bias=None if self.bias is None else self.bias[columns],
            lora_B=None if self.lora_B is None else self.lora_B[columns],
        )


class Needs(NamedTuple):
    """Whose gradient will be asked for."""

    hidden: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> Needs:
        enabled = torch.is_grad_enabled()

        def asked(x: Tensor | None) -> bool:
            return enabled and x is not None and x.requires_grad

        lora = asked(head.lora_A) or asked(head.lora_B)  # both or none: most of their work is the same
        return cls(hidden=asked(hidden), weight=asked(head.weight), bias=asked(head.bias), lora_A=lora, lora_B=lora)

    @property
    def dlogits(self) -> bool:
        """Whether backward needs dlogits themselves, not only their product with the head."""
        return self.weight or self.bias or self.lora

    @property
    def lora(self) -> bool:
        return self.lora_A


class Gradients(NamedTuple):
    """In the order of :class:`Needs`; ``None`` where not asked for."""

    hidden: Tensor | None = None  # [N, T, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    lora_A: Tensor | None = None  # [r, D]
    lora_B: Tensor | None = None  # [V, r]

    def to_schema(self, like: Tensor) -> tuple[Tensor, ...]:
        """What an operator returns, which is never None: empty tensors instead."""
        return tuple(like.new_empty(0) if x is None else x for x in self)

    @classmethod
    def from_schema(cls, found: Sequence[Tensor], needs: Needs) -> Gradients:
        return cls(*(x if needed else None for x, needed in zip(found, needs, strict=True)))


class Saved(NamedTuple):
    """What backward needs beside the arguments; empty where it does not. ``unit_``: before the weight from the loss and
    the scale of the row, which is known after unit dlogits are written."""

    rows: Tensor  # [A] indices into N·T
    normalizer: Tensor  # [2, A]: peak and log-total
    unit_scale: Tensor  # [A]: see napo_loss.parallel.columns.Rows
    unit_dhidden: Tensor  # [A, D] in full precision
    unit_dlogits_lora_B: Tensor  # [A, r] in full precision: their product
    unit_dlogits: Tensor  # [A, V] in the dtype of the factors, if kept

    @property
    def keeps_dlogits(self) -> bool:
        return self.unit_dlogits.numel() > 0

    @classmethod
    def empty(cls, rows: Tensor, hidden: Tensor, head: Head, needs: Needs, *, kept: int | torch.SymInt) -> Saved:
        """Memory to write into, for ``rows [A]``; ``kept``: rows of dlogits, A or none."""
        (V, D), A = head.weight.shape, rows.shape[0]
        r = 0 if head.lora_B is None else head.lora_B.shape[1]
        full = accumulation_dtype(hidden)
        return cls(
            rows=rows,
            normalizer=hidden.new_empty((2, A), dtype=full),
            unit_scale=hidden.new_empty(A, dtype=full),
            unit_dhidden=hidden.new_empty((A if needs.hidden else 0, D), dtype=full),
            unit_dlogits_lora_B=hidden.new_empty((A if needs.lora else 0, r), dtype=full),
            unit_dlogits=padded(hidden, kept, V),
        )


@dataclass
class Steps:
    """What is not a matrix product, with raw logits as input: by Triton kernels, or by their plain-tensor twins."""

    linear_rows: Callable[..., Tensor]
    linear_block: Callable[..., None]

    def rows(
        self,
        logits: Tensor,  # [rows, V]
        targets: Tensor,  # [rows]
        head: Head,
        dlogits: Tensor | None = None,  # [rows, V]
        *,
        statistics: bool = False,
    ) -> Rows:
        """Writes unit dlogits, which may replace the logits; without ``dlogits`` these stay as they are."""
        return Rows.of(self.linear_rows(logits, targets, dlogits, **_shaping(head), statistics=statistics))

    def block(
        self,
        logits: Tensor,  # [rows, columns], those of the vocabulary from `first` on
        targets: Tensor,  # [rows]
        head: Head,  # of these columns
        first: int,
        normalizer: Tensor,  # [2, rows]
        w: Tensor,  # [rows]
        dlogits: Tensor,  # [rows, columns]
    ) -> None:
        """Writes dlogits with their weight ``w``, which may replace the logits."""
        self.linear_block(logits, targets, first, normalizer, w, dlogits, **_shaping(head))

    def reduce(self, x: Tensor) -> Tensor:
        """Adds what the other columns of a split vocabulary contribute, in place; here all columns are."""
        return x

    def width(self, V: int) -> int:
        """Columns by which rows are chunked: the same number on all ranks that exchange something for each chunk."""
        return V


def _shaping(head: Head) -> dict[str, Any]:
    return {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
