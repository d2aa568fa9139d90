"""What the rows say: means, paired differences with intervals, and what validation would choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from examples.noise_study.plan import AXES_SEEDS, BETA, RATE

Rows = list[dict[str, Any]]
LEVEL = 0.95  # of every interval


class Estimate(NamedTuple):
    mean: float
    half_width: float  # of the interval of the mean over seeds
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}{self._interval}"

    @property
    def signed(self) -> str:
        return f"{100 * self.mean:+.1f}{self._interval}".replace("-", "−")

    @property
    def _interval(self) -> str:
        return f" ± {100 * self.half_width:.1f}" if self.seeds > 1 else ""  # one seed says nothing of its like


class Point(NamedTuple):
    """Where a loss stood: the axes that its user turns."""

    beta: float
    learning_rate: float
    epoch: float


def estimate(values: Iterable[float]) -> Estimate:
    """Mean over seeds and the half width of its Student interval."""
    x = np.array(list(values))
    wide = stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * stats.sem(x) if len(x) > 1 else float("nan")
    return Estimate(float(x.mean()), float(wide), len(x))


def where(rows: Rows, **equal: Any) -> Rows:
    return [row for row in rows if all(row[name] == x for name, x in equal.items())]


def common(rows: Rows) -> Rows:
    """The one setting for all."""
    return where(rows, beta=BETA, learning_rate=RATE)


def last_epoch(rows: Rows) -> float:
    return max(row["epoch"] for row in rows)


def by_seed(rows: Rows, column: str) -> dict[int, float]:
    return {int(row["seed"]): row[column] for row in rows}


def difference(rows: Rows, other: Rows, column: str = "test") -> Estimate:
    """Of the same seeds, so that what a model and its pairs are worth cancels."""
    a, b = by_seed(rows, column), by_seed(other, column)
    return estimate(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def walked(rows: Rows) -> Rows:
    """Of the seeds that walked the axes: points of other β and learning rates are compared on these."""
    return [row for row in rows if row["seed"] < AXES_SEEDS]


def own_best(rows: Rows) -> tuple[Point, Rows]:
    """The rows at the setting and epoch with the best mean accuracy on validation questions; they report the test."""
    found: dict[Point, Rows] = defaultdict(list)
    for row in rows:
        found[Point(row["beta"], row["learning_rate"], row["epoch"])].append(row)
    most = max(map(len, found.values()))
    whole = {point: x for point, x in found.items() if len(x) == most}  # no point with the lucky seeds only
    point = max(whole, key=lambda p: np.mean([row["valid"] for row in whole[p]]))
    return point, whole[point]


def converged(rows: Rows) -> Rows:
    """At the one setting, after the last epoch."""
    rows = common(rows)
    return where(rows, epoch=last_epoch(rows))


def curve(rows: Rows, column: str) -> tuple[list[float], list[Estimate]]:
    """Over epochs."""
    epochs = sorted({row["epoch"] for row in rows})
    return epochs, [estimate(row[column] for row in where(rows, epoch=epoch)) for epoch in epochs]


def present(rows: Rows, names: Iterable[str]) -> list[str]:
    have = {row["loss"] for row in rows}
    return [name for name in names if name in have]
