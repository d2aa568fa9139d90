"""All runs. Each question has its own part of the plan; a run that two parts share is trained once."""

from __future__ import annotations

from collections.abc import Iterator

from examples.noise_study.losses import GROUPS, LOSSES
from examples.noise_study.training import Run

SEEDS = range(10)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
BETA, RATE = 1.0, 2e-4
"""The one setting at which everything is compared, trained to convergence."""
AXES = [(0.3, RATE), (3.0, RATE), (BETA, 5e-5), (BETA, 5e-4)]
"""β and learning rate: one axis each. Epochs are the third."""
AXES_SEEDS = 5  # of the seeds; four points of eleven losses are most of the hours
ESTIMATES = ("moment, one batch", "moment, 2q", "moment, √q", "moment, q²")
"""Other ways from moments to q: tried at the one setting, over all rates."""
AT_ALL_SETTINGS = [loss for loss in LOSSES if loss not in ESTIMATES]
MAPPED = (0.0, 0.3)  # rates of swaps at which all axes are walked
OTHER_NOISE = (("close", 0.3), ("right", 0.3))


def plan(seeds: range = SEEDS) -> Iterator[Run]:
    """The one setting first, then the axes; seed by seed, so that whoever stops has all losses of some seeds."""
    for seed in seeds:
        for rate in RATES:
            for loss in (*LOSSES, *GROUPS) if rate in MAPPED else LOSSES:
                yield Run("pictures", "swapped", rate, loss, BETA, RATE, seed)
        for noise, rate in OTHER_NOISE:
            for loss in AT_ALL_SETTINGS:
                yield Run("pictures", noise, rate, loss, BETA, RATE, seed)
        for rate in MAPPED:
            for loss in TEXT:
                yield Run("text", "swapped", rate, loss, BETA, RATE, seed)
    for seed in seeds[:AXES_SEEDS]:
        for rate in MAPPED:
            for beta, learning_rate in AXES:
                for loss in AT_ALL_SETTINGS:
                    yield Run("pictures", "swapped", rate, loss, beta, learning_rate, seed)


TEXT = ("DPO", "cDPO", "rDPO", "IPO", "Dr.DPO", "q = 0.7", "q = 1", "released", "moment")


def quick() -> list[Run]:
    """A minute: one seed, few pairs, and numbers that mean nothing."""
    losses = ("DPO", "released", "moment", "all moment")
    return [
        Run("pictures", "swapped", rate, loss, BETA, RATE, seed=0, pairs=64, epochs=(1, 2))
        for rate in MAPPED
        for loss in losses
    ]
