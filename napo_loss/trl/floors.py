"""A negative whose dynamic weight stays at the floor is hardly trained, and that keeps it there: say so, once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from napo_loss.objective.eager import WEIGHT_FLOOR

PATIENCE = 200
"""Micro-batches in a row at the floor, after which it is said."""


class Floors:
    """Called with the weights of each micro-batch, by the negatives' names."""

    def __init__(self):
        self.steps: Counter[str] = Counter()

    def __call__(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            low = weight <= 1.001 * WEIGHT_FLOOR
            self.steps[name] = self.steps[name] + 1 if low else 0
            if self.steps[name] == PATIENCE:
                logging.getLogger(__name__).warning(
                    f"the dynamic weight of {name!r} has been at its floor of {WEIGHT_FLOOR} for {PATIENCE} "
                    'micro-batches: it is hardly trained. See rewards/margins, or set negative_weights="fixed"'
                )
