"""What the operators of this room are called with: records, with names and rich fields; schemas, flat.

``operator(**call.to_schema())`` calls one, and ``from_schema(…)`` is the first line inside it, its fake and its
backward, so that no other line knows of an order. A backward operator takes the same schema after what is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from napo_loss.backend import Call, by_name
from napo_loss.logps.records import Head, Needs
from napo_loss.parallel.columns import ALL_COLUMNS, Columns

if TYPE_CHECKING:
    from typing_extensions import Self


class SavedCall(Call):
    """A call that waits for its backward pass, with some of the operator's outputs."""

    @staticmethod
    def save(ctx, schema: Sequence[Any], **outputs: Tensor) -> None:
        """Keeps a schema's values: tensors where autograd looks after them, the rest beside."""
        ctx.rest = [None if isinstance(x, Tensor) else x for x in schema]
        ctx.places = [i for i, x in enumerate(schema) if isinstance(x, Tensor)]
        ctx.outputs = tuple(outputs)
        ctx.save_for_backward(*(schema[i] for i in ctx.places), *outputs.values())
        ctx.set_materialize_grads(False)

    @classmethod
    def restore(cls, ctx) -> tuple[Self, dict[str, Tensor]]:
        """The call, and the outputs by name."""
        schema, tensors = list(ctx.rest), iter(ctx.saved_tensors)
        for i in ctx.places:
            schema[i] = next(tensors)
        call = cls.from_schema(*schema)  # pyright: ignore[reportAttributeAccessIssue]
        return call, dict(zip(ctx.outputs, tensors, strict=True))


@dataclass(frozen=True)
class LogitsCall(SavedCall):
    """Sequence log-probs from all the logits, and their backward."""

    SCHEMA: ClassVar[dict[str, str]] = {
        "logits": "Tensor", "labels": "Tensor", "token_weights": "Tensor?", "shift": "SymInt", "ignore_index": "SymInt",
        "inplace_backward": "bool", "backend": "str",
    }  # fmt: skip

    logits: Tensor  # [N, T, V]
    labels: Tensor  # [N, T]
    token_weights: Tensor | None = None  # [N, T]
    shift: int = 1  # positions by which labels are ahead of the logits that predict them: 1 or 0
    ignore_index: int = -100
    inplace_backward: bool = False
    backend: str = "auto"

    @classmethod
    def of_targets(
        cls,
        logits: Tensor,  # [N, T, V]
        targets: Tensor,  # [N, T]
        *,
        token_weights: Tensor | None = None,  # [N, T]
        ignore_index: int = -100,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> LogitsCall:
        """Of labels that are aligned already with the positions that predict them."""
        return cls(logits, targets, token_weights, 0, ignore_index, inplace_backward, backend)

    def to_schema(self) -> dict[str, Any]:
        return {
            "logits": self.logits, "labels": self.labels, "token_weights": self.token_weights, "shift": self.shift,
            "ignore_index": self.ignore_index, "inplace_backward": self.inplace_backward, "backend": self.backend,
        }  # fmt: skip

    @classmethod
    def from_schema(cls, *values: Any) -> LogitsCall:
        return cls(**cls.named(values))


@dataclass(frozen=True)
class ShardedCall(SavedCall):
    """Token log-probs from the logits of some columns of the vocabulary."""

    SCHEMA: ClassVar[dict[str, str]] = {
        "logits": "Tensor", "targets": "Tensor", **Columns.SCHEMA, "ignore_index": "SymInt",
        "inplace_backward": "bool", "backend": "str",
    }  # fmt: skip

    logits: Tensor  # [N, T, columns]
    targets: Tensor  # [N, T]: labels, aligned with the positions that predict them
    columns: Columns
    ignore_index: int = -100
    inplace_backward: bool = False
    backend: str = "auto"

    def to_schema(self) -> dict[str, Any]:
        return {
            "logits": self.logits, "targets": self.targets, **self.columns.to_schema(),
            "ignore_index": self.ignore_index, "inplace_backward": self.inplace_backward, "backend": self.backend,
        }  # fmt: skip

    @classmethod
    def from_schema(cls, *values: Any) -> ShardedCall:
        given = cls.named(values)
        columns = Columns.from_schema(given.pop("columns"), given.pop("group_name"))
        return cls(columns=columns, **given)


@dataclass(frozen=True)
class LinearCall(SavedCall):
    """Token log-probs from hidden states and the lm_head, and their backward.

    An operator runs below autograd and cannot see whose gradient will be asked for, so ``needs`` says it.
    """

    SCHEMA: ClassVar[dict[str, str]] = {
        "hidden": "Tensor", **Head.SCHEMA, "targets": "Tensor", "needs": "bool[]", **Columns.SCHEMA,
        "ignore_index": "SymInt", "budget": "SymInt", "max_active": "SymInt", "token_statistics": "bool",
        "backend": "str",
    }  # fmt: skip

    hidden: Tensor  # [N, T, D]
    head: Head
    targets: Tensor  # [N, T]: labels, aligned with the positions that predict them
    needs: Needs
    columns: Columns | None = None  # None: the whole vocabulary is here
    ignore_index: int = -100
    budget: int = 0  # bytes of logits-sized memory; 0 for the default
    max_active: int = 0  # a bound of the number of active positions; 0: they are counted
    token_statistics: bool = False
    backend: str = "auto"

    @classmethod
    def of(cls, hidden: Tensor, head: Head, targets: Tensor, **others: Any) -> LinearCall:
        """With the gradients that autograd will ask for."""
        return cls(hidden, head, targets, Needs.of(hidden, head), **others)

    def to_schema(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden, **by_name(self.head, Head), "targets": self.targets, "needs": list(self.needs),
            **(self.columns.to_schema() if self.columns else ALL_COLUMNS), "ignore_index": self.ignore_index,
            "budget": self.budget, "max_active": self.max_active, "token_statistics": self.token_statistics,
            "backend": self.backend,
        }  # fmt: skip

    @classmethod
    def from_schema(cls, *values: Any) -> LinearCall:
        given = cls.named(values)
        columns, group_name = given.pop("columns"), given.pop("group_name")
        return cls(
            head=Head(**{name: given.pop(name) for name in Head.SCHEMA}),
            needs=Needs(*given.pop("needs")),
            columns=Columns.from_schema(columns, group_name) if columns else None,
            **given,
        )
