"""From what a caller has of a split vocabulary, a ``VocabShard`` or DTensors, to the columns that are on this rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from napo_loss.checks import SHARDED, check_group, is_dtensor
from napo_loss.parallel.columns import Columns
from napo_loss.types import LowRank, VocabShard


class LocalHead(NamedTuple):
    """Hidden states, which every rank holds whole, and the rows of the lm_head and its bias that are here."""

    hidden: Tensor  # [N, T, D]
    weight: Tensor | LowRank  # [columns, D]
    bias: Tensor | None  # [columns]
    columns: Columns | None  # None: all of the vocabulary is here


def local_logits(logits: Any) -> tuple[Tensor, Columns | None]:
    """The columns of the logits that are here; None where that is all of them."""
    if isinstance(logits, VocabShard):
        local = _check_shard("logits", logits)
        count, columns = _columns(logits, local.shape[-1])
        local = _first(local, -1, count)
    elif is_dtensor(logits):
        local, columns = _from_dtensor("logits", logits, logits.dim() - 1)
    else:
        return logits, None
    if local.shape[-1] == 0:  # a column that takes no part, rather than kernels for none at all
        local = torch.nn.functional.pad(local, (0, 1), value=-torch.inf)
    return local, columns


def local_head(hidden: Tensor, weight: Tensor | LowRank | VocabShard, bias: Tensor | None) -> LocalHead:
    if isinstance(weight, VocabShard):
        rows, head = len(_check_shard("weight", weight)), weight.local
        count, columns = _columns(weight, rows)
        for name, x in (("bias", bias), ("lora_B", head.lora_B if isinstance(head, LowRank) else None)):
            if x is not None and len(x) != rows:
                raise ValueError(f"{name} must have the {rows} rows of weight.local, those of this rank, got {len(x)}")
        if isinstance(head, LowRank):
            head = head._replace(weight=_first(head.weight, 0, count), lora_B=_first(head.lora_B, 0, count))
        else:
            head = _first(head, 0, count)
        return LocalHead(hidden, head, None if bias is None else _first(bias, 0, count), columns)
    whole = weight.weight if isinstance(weight, LowRank) else weight
    if not is_dtensor(whole):
        if is_dtensor(hidden):
            raise TypeError("hidden is a DTensor and weight is not: give both on one mesh, or hidden.to_local()")
        return LocalHead(hidden, weight, bias, columns=None)
    if not is_dtensor(hidden):
        # A head that FSDP2 split looks the same, but there each rank has positions of its own.
        raise TypeError(SHARDED.format(name="weight", what="a DTensor and hidden is not"))
    head, columns = _from_dtensor("weight", whole, 0)
    if isinstance(weight, LowRank):
        lora_A = _replicated("lora_A", weight.lora_A, whole) if is_dtensor(weight.lora_A) else weight.lora_A
        head = LowRank(head, lora_A, _same_shard("lora_B", weight.lora_B, whole), weight.scale)
    bias = None if bias is None else _same_shard("bias", bias, whole)
    return LocalHead(_replicated("hidden", hidden, whole), head, bias, columns)


def _check_shard(name: str, shard: VocabShard) -> Tensor:
    """The local tensor with the vocabulary among its dimensions."""
    check_group(f"{name}.process_group", shard.process_group)
    local = shard.local.weight if isinstance(shard.local, LowRank) else shard.local
    if not isinstance(local, Tensor) or local.dim() < 2:
        given = f"shape {list(local.shape)}" if isinstance(local, Tensor) else type(local).__name__
        raise TypeError(f"{name}.local must be the columns of the vocabulary that this rank holds, got {given}")
    if not (isinstance(shard.V, int) and shard.V >= 1):
        raise ValueError(f"{name}.V must be the size of the whole vocabulary, got {shard.V!r}")
    if shard.start is not None and shard.start < 0:
        raise ValueError(f"{name}.start must be >= 0, got {shard.start}")
    return local


def _columns(shard: VocabShard, size: int) -> tuple[int, Columns | None]:
    """How many of the ``size`` local columns are no padding, and which they are."""
    process_group, V = shard.process_group, shard.V
    rank = 0 if process_group is None else process_group.rank()
    start = rank * size if shard.start is None else shard.start
    count = max(0, min(size, V - start))
    if process_group is None:
        return count, None
    width = -(-V // process_group.size())
    return count, Columns(start, count, V, width, process_group.group_name)


def _first(x: Tensor, dim: int, count: int) -> Tensor:
    """``x`` without padding; as it is where it has none, since backward of a slice copies the gradient."""
    return x if x.shape[dim] == count else x.narrow(dim, 0, count)


def _from_dtensor(name: str, x: Any, dim: int) -> tuple[Tensor, Columns | None]:
    """The local part of a DTensor that at most one dimension of its mesh splits over the vocabulary."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, V = x.device_mesh, x.shape[dim]
    split = [i for i, p in enumerate(x.placements) if p == Shard(dim)]
    rest = [p for i, p in enumerate(x.placements) if i not in split]
    # Logits may be split over the batch too: each rank's sequences are its own affair. A head may not.
    others = (Replicate(), Shard(0)) if name == "logits" else (Replicate(),)
    if len(split) > 1 or not all(p in others for p in rest):
        raise TypeError(
            f"{name} must have placement {Shard(dim)!r}, its vocabulary, on one dimension of the mesh at most and "
            f"{' or '.join(map(repr, others))} on others, got {x.placements}: redistribute it first"
        )
    local = x.to_local()
    if not split:
        return local, None
    size, rank = mesh.size(split[0]), mesh.get_local_rank(split[0])
    width = -(-V // size)
    return local, Columns(min(V, rank * width), local.shape[dim], V, width, mesh.get_group(split[0]).group_name)


def _replicated(name: str, x: Any, like: Any) -> Tensor:
    """``x`` whole on the ranks that split the vocabulary; its gradient, which backward adds up, is whole there too."""
    from torch.distributed.tensor import Replicate

    if x.device_mesh != like.device_mesh:
        raise TypeError(f"{name} must be on weight's mesh {like.device_mesh}, got {x.device_mesh}")
    # Where the weight is replicated, a part of the batch would give each rank a part of its gradient.
    if not all(mine.is_replicate() or p.is_shard() for mine, p in zip(x.placements, like.placements, strict=True)):
        raise TypeError(
            f"{name} must be replicated wherever weight is, {like.placements}, got {x.placements}; data parallelism is "
            "DDP's or FSDP2's"
        )
    whole = [Replicate()] * like.device_mesh.ndim
    return x.redistribute(placements=whole).to_local(grad_placements=whole)


def as_replicated(x: Tensor, like: Any) -> Tensor:
    """``x``, which the ranks of ``like``'s mesh hold whole, as the DTensor that says so."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_dtensor(x):
        return x
    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _same_shard(name: str, x: Any, like: Any) -> Tensor:
    if not is_dtensor(x) or x.device_mesh != like.device_mesh or x.placements != like.placements:
        given = x.placements if is_dtensor(x) else type(x).__name__
        raise TypeError(f"{name} must be a DTensor placed like weight, {like.placements}, got {given}")
    return x.to_local()
