"""Chooses the demo's hyper-parameters on validation pictures, with the same effort for every arm.

    python examples/demo_tune.py    # about fifteen minutes; writes results/tuning.json

Every arm is run over the same grid of learning rates and β on two seeds which the demo does not report, and gets the
point with the best overall validation accuracy. α, q and weights are not tuned. No test picture is looked at.

What was decided after seeing validation numbers, and so is not blind: the scale (an earlier task with smaller patches,
fewer pairs and an own grid hardly moved any arm and was dropped); the range of the grid, which moved to smaller
learning rates and β; and the two arms with equal weights. An earlier version shared one β between the arms, which
suited NaPO better than plain DPO. The committed file was put together from three sessions over the same seeds, each
point run once.
"""

from __future__ import annotations

import demo  # sets the environment, so it comes first  # isort: skip
import itertools
import json
from dataclasses import replace
from typing import Any

from demo_arms import NEGATIVES, SCALE
from demo_train import Arm, Scale

SEEDS = [100, 101]
LEARNING_RATES = [1e-4, 3e-4, 1e-3]
BETAS = [0.1, 0.3, 1.0]


def grid() -> list[Arm]:
    points = itertools.product(NEGATIVES.items(), BETAS, LEARNING_RATES)
    return [Arm(f"{name} | {beta} | {lr}", negatives, lr, beta) for (name, negatives), beta, lr in points]


def choose(validation: dict[str, dict[str, float]]) -> dict[str, Any]:
    """For each arm the β and learning rate with the best overall accuracy."""
    chosen = {}
    for name in NEGATIVES:
        points = itertools.product(BETAS, LEARNING_RATES)
        beta, rate = max(points, key=lambda point: validation[f"{name} | {point[0]} | {point[1]}"]["overall"])
        chosen[name] = {"beta": beta, "learning_rate": rate}
    return {"validation": validation, "chosen": chosen, "seeds": SEEDS}


def means(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    def mean(arm: Arm, column: str) -> float:
        return round(sum(run["arms"][arm.name]["curve"][-1][column] for run in runs) / len(runs), 4)

    return {arm.name: {c: mean(arm, c) for c in ("overall", "conflict", "next")} for arm in grid()}


def main() -> None:
    scale: Scale = replace(SCALE, evaluations=1)
    result = choose(means(demo.run_seeds(SEEDS, grid(), scale, "validation", workers=2)))
    (demo.RESULTS / "tuning.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
