"""A vocabulary split over the ranks of a process group: which columns are here, and what the ranks exchange.

Every rank holds some columns of the logits (rows of the lm_head), and the same positions and labels. Three floats of
each active position go around: the logsumexp of a rank's columns, for the largest of them; then what its exponential
adds to the sum, and the label's logit, which one rank has. Backward is local, but for the gradient of what every rank
holds whole (hidden states, lora_A): a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from napo_loss.parallel.reductions import all_reduce

PRIME = 16381
"""The squares of shards' bounds are added up modulo this: sums over 1024 ranks are whole numbers in float32."""


ALL_COLUMNS: dict[str, Any] = {"columns": [], "group_name": ""}
"""In an operator's schema, the columns of a vocabulary that is not split."""


class Columns(NamedTuple):
    """The columns of the vocabulary on this rank, in numbers and a name that an operator's schema can hold."""

    SCHEMA = {"columns": "SymInt[]", "group_name": "str"}  # noqa: RUF012, a NamedTuple cannot say ClassVar

    start: int
    count: int
    V: int
    width: int  # of a rank, about, and the same number on all of them: by it rows are chunked, and so exchanged
    group_name: str  # of the process group whose ranks hold the rest

    def to_schema(self) -> dict[str, Any]:
        return {"columns": [self.start, self.count, self.V, self.width], "group_name": self.group_name}

    @classmethod
    def from_schema(cls, columns: Sequence[int], group_name: str) -> Columns:
        start, count, V, width = columns
        return cls(start, count, V, width, group_name)

    @property
    def checks(self) -> list[float]:
        """Of intervals that are a partition of the vocabulary these add up to V and, modulo the prime, to V²."""
        return [self.count, self.count * (2 * self.start + self.count) % PRIME]

    @property
    def process_group(self):
        return torch.distributed.distributed_c10d._resolve_process_group(self.group_name)  # pyright: ignore


def merge(
    logp: Tensor,  # [A]
    lse: Tensor,  # [A]
    inside: Tensor,  # [A]: whether the label is one of these columns
    columns: Columns,
) -> tuple[Tensor, Tensor]:
    """``logp [A]`` and ``lse [A]`` of the whole vocabulary, from those of this rank's columns.

    Columns that together are not the vocabulary, each once, give NaN.
    """
    A, process_group = len(lse), columns.process_group
    peak = all_reduce(lse.clone(), process_group, largest=True)
    here = lse - peak
    hit = (logp + here).where(lse > -torch.inf, -torch.inf)  # of columns that are all -inf, logp is NaN
    sums = torch.cat([here.exp(), hit.where(inside, 0), lse.new_tensor(columns.checks)])
    total, hit, (count, squares) = all_reduce(sums, process_group).split([A, A, 2])
    whole = (count == columns.V) & (squares % PRIME == columns.V**2 % PRIME)
    return (hit - total.log()).where(whole, torch.nan), peak + total.log()
