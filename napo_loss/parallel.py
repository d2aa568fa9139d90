"""Data-parallel reductions over ``torch.distributed``; nothing here runs unless a process group is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mean_over_group(means: Tensor, count: int, *, by_count: bool, process_group: ProcessGroup | None) -> Tensor:
    """The mean over ranks of each rank's ``means`` (a detached tensor), in one all-reduce.

    Args:
        means: this rank's means, any shape.
        count: how many samples are behind them on this rank.
        by_count: weigh each rank by its count (the mean over all samples) instead of equally.
        process_group: the ranks; ``None`` means this rank alone and no communication.
    """
    if process_group is None:
        return means
    import torch.distributed as dist

    weight = float(count) if by_count else 1.0
    packed = torch.cat([means.flatten() * weight, means.new_full((1,), weight)])
    dist.all_reduce(packed, group=process_group)
    return (packed[:-1] / packed[-1]).view_as(means)
