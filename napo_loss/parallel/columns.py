"""A vocabulary split over the ranks of a process group: which columns are here, and what the ranks exchange.

Every rank holds some columns of the logits (rows of the lm_head), and the same positions and labels. Three floats of
each active position go around: the peak of a rank's columns, for the largest of them; then what they add to the sum of
exponentials, and the label's logit, which one rank has; two more where token statistics are asked for. Backward is
local, but for the gradient of what every rank holds whole (hidden states, lora_A): a sum over ranks.
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


class Rows(NamedTuple):
    """What a pass over some columns of rows of logits z tells of each row."""

    hit: Tensor  # [rows]: the label's logit less the peak; NaN where it is not here
    normalizer: Tensor  # [2, rows]: peak and log-total, softmax = exp((z − peak) − log-total); see DESIGN.md
    unit_scale: Tensor  # [rows]: what unit dlogits, if they were written, are to be multiplied by
    statistics: Tensor | None = None  # [2, rows]: entropy in nats, mean of the logits

    # The peak is the largest logit or close to it: where statistics are asked for it is, and hit is 0 on top.

    @classmethod
    def of(cls, found: Tensor) -> Rows:
        """From hit, peak, log-total, scale and, where they were asked for, entropy and mean, ``[4 or 6, rows]``."""
        return cls(found[0], found[1:3], found[3], found[4:] if found.shape[0] > 4 else None)


def merge(
    found: Rows,
    inside: Tensor,  # [A]: whether the label is one of these columns
    columns: Columns,
) -> Rows:
    """Of the whole vocabulary, from those of this rank's columns; columns that are not each there once give NaN.

    The entropy of a whole is ``Σ_r share_r·(H_r − log share_r)``; here shares are of the largest column, not of 1.
    """
    A, process_group = len(found.hit), columns.process_group
    local_peak, local_log_total = found.normalizer
    peak = all_reduce(local_peak.clone(), process_group, largest=True)
    here = local_peak - peak
    log_share = here + local_log_total
    share = log_share.exp()
    hit = (found.hit + here).where(local_peak > -torch.inf, -torch.inf)  # where all these columns are -inf: no NaN
    parts = [share, hit.where(inside, 0)]
    if found.statistics is not None:
        entropy, mean = found.statistics
        parts += [(share * (entropy - log_share)).where(share > 0, 0), mean * (columns.count / columns.V)]
    sums = all_reduce(torch.cat([*parts, peak.new_tensor(columns.checks)]), process_group)
    *parts, (count, squares) = sums.split([*[A] * len(parts), 2])
    whole = (count == columns.V) & (squares % PRIME == columns.V**2 % PRIME)
    total, hit = parts[0], parts[1].where(whole, torch.nan)
    normalizer, unit_scale = torch.stack([peak, total.log()]), torch.ones_like(total)
    if found.statistics is None:
        return Rows(hit, normalizer, unit_scale)
    entropy = (parts[2] / total + normalizer[1]).clamp_min(0)
    return Rows(hit, normalizer, unit_scale, torch.stack([entropy, parts[3]]).where(whole, torch.nan))
