"""Bases of the records that cross the borders of trainers: walks over inputs and outputs, casts, copies."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node, tree_map_only

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class Record:
    """Base of dataclasses that the walks of trainers over inputs and outputs leave whole.

    The fields named in ``tensors`` are children of PyTorch's trees (``tree_map``, FSDP2, DDP, ``torch.export``); the
    others ride along. ``.to`` is what accelerate asks for, and a dataclass that is not frozen what Lightning can fill.
    A NamedTuple will not do: it is rebuilt from what it iterates over, of a result that unpacks as three only three
    fields, and a map over its tensors meets its numbers too.
    """

    def __init_subclass__(cls, tensors: tuple[str, ...], **kwargs: Any):
        super().__init_subclass__(**kwargs)

        def flatten(record: Any) -> tuple[list, dict]:
            given = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
            return [given.pop(name) for name in tensors], given

        def flatten_with_keys(record: Any) -> tuple[list, dict]:
            children, rest = flatten(record)
            return [(GetAttrKey(name), child) for name, child in zip(tensors, children, strict=True)], rest

        def unflatten(children: Any, rest: Any) -> Any:
            return cls(**dict(zip(tensors, children, strict=True)), **rest)

        register_pytree_node(
            cls, flatten, unflatten, serialized_type_name=f"napo_loss.{cls.__name__}",
            flatten_with_keys_fn=flatten_with_keys,
        )  # fmt: skip

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The record with every tensor moved or cast, as ``Tensor.to`` does."""
        return tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), self)

    def _replace(self, **changes: Any) -> Self:
        """The record with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]


class SharesGroup:
    """Base of what holds a ``process_group``: a deep copy has the same one, which is a connection and no value."""

    process_group: ProcessGroup | None

    def __deepcopy__(self, memo: dict) -> Self:
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = twin = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
