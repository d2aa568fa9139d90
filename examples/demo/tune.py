"""Chooses the demo's β and learning rates on validation questions, by one grid for all arms.

    python -m examples.demo.tune    # twenty minutes; writes results/demo-tuning.json, and goes on where that ends

Two seeds that the demo does not report. An arm gets the point with the best accuracy over all validation questions,
without and with swapped pairs; while that lies at an edge of the grid, the grid grows there, for all arms. α, q and
weights are not tuned. The validation questions are clean, which users with noisy labels may not have. No test question
is looked at; what was chosen by looking at validation numbers before, and so is not blind: the world and the scale.
"""

from __future__ import annotations

import json
from itertools import product
from statistics import mean
from typing import Any

from examples.demo.arms import CONFIGS, FOLDER, SCALE
from examples.demo.seeds import run_seeds
from examples.demo.training import Arm

SEEDS = [100, 101]
BETAS, LEARNING_RATES = [0.3, 1.0, 3.0], [1e-4, 2e-4, 4e-4]
LARGEST = 7  # values of either
FILE = FOLDER / "demo-tuning.json"

Points = dict[str, dict[tuple[float, float], float]]


def best(points: Points) -> dict[str, tuple[float, float]]:
    """β and learning rate of each arm."""
    return {name: max(found, key=lambda at: found[at]) for name, found in points.items()}


def grown(axis: list[float], chosen: set[float]) -> list[float]:
    """The axis, longer where its end was chosen."""
    if len(axis) >= LARGEST:
        return axis
    below = [_round(axis[0] ** 2 / axis[1])] * (axis[0] in chosen)
    above = [_round(axis[-1] ** 2 / axis[-2])] * (axis[-1] in chosen)
    return [*below, *axis, *above]


def _round(x: float) -> float:
    """One digit: 0.3, 1, 3, 9 and 2e-4, 4e-4, 8e-4."""
    return float(f"{x:.0e}")


def validate(arms: list[Arm]) -> dict[str, float]:
    """Accuracy over all validation questions, the mean over seeds and rates of swaps."""
    runs = run_seeds(SEEDS, arms, SCALE, "validation", workers=2)
    return {
        arm.name: round(mean(x["end"]["overall"] for run in runs for x in run["arms"][arm.name].values()), 4)
        for arm in arms
    }


def main() -> None:
    betas, rates = BETAS, LEARNING_RATES
    points: Points = {name: {} for name in CONFIGS}
    if FILE.exists():
        for x in json.loads(FILE.read_text())["validation"]:
            points[x["arm"]][x["beta"], x["learning_rate"]] = x["overall"]
    while True:
        for beta in betas:
            missing = [(name, rate) for name, rate in product(CONFIGS, rates) if (beta, rate) not in points[name]]
            arms = [Arm(f"{name} {rate}", CONFIGS[name], beta, rate) for name, rate in missing]
            found = validate(arms) if arms else {}
            for (name, rate), arm in zip(missing, arms, strict=True):
                points[name][beta, rate] = found[arm.name]
            write(points)
        chosen = best(points).values()
        longer = grown(betas, {beta for beta, _ in chosen}), grown(rates, {rate for _, rate in chosen})
        if longer == (betas, rates):
            return
        betas, rates = longer


def write(points: Points) -> None:
    rows: list[dict[str, Any]] = [
        {"arm": name, "beta": beta, "learning_rate": rate, "overall": accuracy}
        for name, found in points.items()
        for (beta, rate), accuracy in sorted(found.items())
    ]
    full = {name: found for name, found in points.items() if found}
    settings = {name: {"beta": beta, "learning_rate": rate} for name, (beta, rate) in best(full).items()}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = f'{{\n "seeds": {SEEDS},\n "chosen": {json.dumps(settings)},\n "validation": [\n  {lines}\n ]\n}}\n'
    FILE.write_text(text)


if __name__ == "__main__":
    main()
