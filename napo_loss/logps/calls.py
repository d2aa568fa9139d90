"""What the operators of this room are called with: records, with names and rich fields; schemas, flat.

``operator(**call.to_schema())`` calls one, and ``from_schema(…)`` is the first line inside it, its fake and its
backward, so that no other line knows of an order. A backward operator takes the same schema after what is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from napo_loss.backend import Call
from napo_loss.logps.records import Head, Needs
from napo_loss.parallel.columns import ALL_COLUMNS, Columns

if TYPE_CHECKING:
    from typing_extensions import Self


class SavedCall(Call):
    """A call that waits for its backward pass, with some of the operator's outputs."""

    @staticmethod
    def save(ctx, schema: Sequence[Any], **outputs: Tensor) -> None:
        """Keeps a schema's arguments: tensors where autograd looks after them, the rest beside."""
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


@dataclass
class LogitsCall(SavedCall):
    """Sequence log-probs from all the logits, and their backward."""

    logits: Tensor  # [N, T, V]
    labels: Tensor  # [N, T]
    token_weights: Tensor | None = None  # [N, T]
    shift: int = 1  # positions by which labels are ahead of the logits that predict them: 1 or 0
    ignore_index: int = -100
    inplace_backward: bool = False
    backend: str = "auto"

    SCHEMA = (
        "Tensor logits, Tensor labels, Tensor? token_weights, SymInt shift, SymInt ignore_index, "
        "bool inplace_backward, str backend"
    )

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
            "logits": self.logits,
            "labels": self.labels,
            "token_weights": self.token_weights,
            "shift": self.shift,
            "ignore_index": self.ignore_index,
            "inplace_backward": self.inplace_backward,
            "backend": self.backend,
        }

    @classmethod
    def from_schema(cls, logits, labels, token_weights, shift, ignore_index, inplace_backward, backend) -> LogitsCall:
        return cls(logits, labels, token_weights, shift, ignore_index, inplace_backward, backend)


@dataclass
class ShardedCall(SavedCall):
    """Token log-probs from the logits of some columns of the vocabulary."""

    logits: Tensor  # [N, T, columns]
    targets: Tensor  # [N, T]: labels, aligned with the positions that predict them
    columns: Columns
    ignore_index: int = -100
    inplace_backward: bool = False
    backend: str = "auto"

    SCHEMA = (
        "Tensor logits, Tensor targets, SymInt[] columns, str group_name, SymInt ignore_index, "
        "bool inplace_backward, str backend"
    )

    def to_schema(self) -> dict[str, Any]:
        return {
            "logits": self.logits,
            "targets": self.targets,
            **self.columns.to_schema(),
            "ignore_index": self.ignore_index,
            "inplace_backward": self.inplace_backward,
            "backend": self.backend,
        }

    @classmethod
    def from_schema(cls, logits, targets, columns, group_name, ignore_index, inplace_backward, backend) -> ShardedCall:
        here = Columns.from_schema(columns, group_name)
        return cls(logits, targets, here, ignore_index, inplace_backward, backend)


@dataclass
class LinearCall(SavedCall):
    """Token log-probs from hidden states and the lm_head, and their backward.

    An operator runs below autograd and cannot see whose gradient will be asked for, so ``needs`` says it.
    """

    hidden: Tensor  # [N, T, D]
    head: Head
    targets: Tensor  # [N, T]: labels, aligned with the positions that predict them
    needs: Needs
    columns: Columns | None  # None: the whole vocabulary is here
    ignore_index: int
    budget: int  # bytes of logits-sized memory; 0 for the default
    backend: str

    SCHEMA = (
        "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, Tensor targets, float[] scalars, "
        "bool[] needs, SymInt[] columns, str group_name, SymInt ignore_index, SymInt budget, str backend"
    )

    @classmethod
    def of(
        cls,
        hidden: Tensor,  # [N, T, D]
        head: Head,
        targets: Tensor,  # [N, T]
        *,
        columns: Columns | None = None,
        ignore_index: int = -100,
        budget: int = 0,
        backend: str = "auto",
    ) -> LinearCall:
        """With the gradients that autograd will ask for."""
        return cls(hidden, head, targets, Needs.of(hidden, head), columns, ignore_index, budget, backend)

    def to_schema(self) -> dict[str, Any]:
        head = self.head
        return {
            "hidden": self.hidden,
            "weight": head.weight,
            "bias": head.bias,
            "lora_A": head.lora_A,
            "lora_B": head.lora_B,
            "targets": self.targets,
            "scalars": [head.lora_scale, head.logit_scale, head.softcap],
            "needs": list(self.needs),
            **(self.columns.to_schema() if self.columns else ALL_COLUMNS),
            "ignore_index": self.ignore_index,
            "budget": self.budget,
            "backend": self.backend,
        }

    @classmethod
    def from_schema(  # noqa: PLR0913, the one place where the flat list stands
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        targets: Tensor,
        scalars: Sequence[float],
        needs: Sequence[bool],
        columns: Sequence[int],
        group_name: str,
        ignore_index: int,
        budget: int,
        backend: str,
    ) -> LinearCall:
        lora_scale, logit_scale, softcap = scalars
        head = Head(weight, bias, lora_A, lora_B, lora_scale, logit_scale, softcap)
        here = Columns.from_schema(columns, group_name) if columns else None
        return cls(hidden, head, targets, Needs(*needs), here, ignore_index, budget, backend)
