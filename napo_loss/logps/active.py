"""The rows of logits that count, a few at a time, for the plain-tensor path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from napo_loss.backend import accumulation_dtype
from napo_loss.logps.gemm import blocks
from napo_loss.logps.tokens import targets

CHUNK_BYTES = 2 * 2**20
"""Upcast logits held at a time: a few rows of a large vocabulary, small enough to stay in a CPU's cache."""


class Chunk(NamedTuple):
    """Some of the active rows, upcast: a copy, to be worked on in place."""

    rows: slice  # of all active ones
    at: tuple[int | Tensor, slice | Tensor]  # their index into [N, T]
    z: Tensor  # [rows, V]

    def leave(self, there: Tensor) -> None:
        """Writes ``z`` to its place in ``there [N, T, V]``."""
        if isinstance(self.at[1], slice):
            there[self.at].copy_(self.z)
        else:
            there[self.at] = self.z.to(there.dtype)


class ActiveRows(NamedTuple):
    """Positions that count: ``logits[n, t]`` predicts ``target``."""

    n: Tensor  # [rows]
    t: Tensor  # [rows]
    target: Tensor  # [rows, 1], 0 where it is outside the vocabulary
    inside: Tensor  # [rows, 1]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, shift: int, ignore_index: int) -> ActiveRows:
        n, t = is_active(labels, shift, ignore_index).nonzero().unbind(1)
        target = labels[n, t + shift, None].long()
        inside = (target >= 0) & (target < logits.shape[-1])
        return cls(n, t, target.where(inside, 0), inside)

    def chunks(self, logits: Tensor) -> Iterator[Chunk]:
        """The last one is gone when the next one is made: they share their memory."""
        V, dtype = logits.shape[-1], accumulation_dtype(logits)
        most = max(1, CHUNK_BYTES // (V * dtype.itemsize))
        # Made once: a system clears the pages of what is made for each chunk, which takes longer than to use them.
        buffer = logits.new_empty((min(most, len(self.n)), V), dtype=dtype)
        for rows, at in self._places(most):
            yield Chunk(rows, at, buffer[: rows.stop - rows.start].copy_(logits[at]))

    def _places(self, most: int) -> list[tuple[slice, tuple]]:
        """Rows that follow each other are a view, which saves the copy that a gather is, unless there are few."""
        gathers = [(part, (self.n[part], self.t[part])) for part in blocks(len(self.n), most)]
        if not self.n.is_cpu:
            return gathers
        breaks = (self.n[1:] != self.n[:-1]) | (self.t[1:] != self.t[:-1] + 1)
        starts = [0, *(1 + breaks.nonzero().flatten()).tolist(), len(self.n)]
        if len(starts) - 1 > 2 * len(gathers):  # a mask with many holes: the views need not be made to be counted
            return gathers
        views = []
        for a, b in itertools.pairwise(starts):
            for part in blocks(b - a, most):
                n, t = int(self.n[a]), int(self.t[a])
                views.append((slice(a + part.start, a + part.stop), (n, slice(t + part.start, t + part.stop))))
        return views if len(views) <= 2 * len(gathers) else gathers


def is_active(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """``[N, T]``: whether the logits at (n, t) predict a label that counts."""
    return targets(labels, bool(shift), ignore_index) != ignore_index
