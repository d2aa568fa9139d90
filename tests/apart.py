"""A comparison of two runs says something only where each has memory of its own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from torch import Tensor


def apart(*runs: Iterable[Tensor]) -> None:
    """Fails where a tensor of one run lies in the storage of another: it would be compared with itself."""
    storages = [{x.untyped_storage().data_ptr() for x in run if x.numel()} for run in runs]
    for one, other in combinations(storages, 2):
        assert not one & other, "results of two runs share memory"
