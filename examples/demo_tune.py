"""Chooses the demo's hyper-parameters on validation pictures, with the same effort for every arm.

    python examples/demo_tune.py    # about fifteen minutes; writes results/tuning.json

Every arm is run with the same learning rates and β on two seeds which the demo does not report. Each arm gets the
learning rate with the best overall validation accuracy; β, shared by all, is the one under which the arms, each with
its own learning rate, do best on average (plain DPO alone would like a smaller one, NaPO a larger one: see the file).
α, q and weights are not tuned. No test picture is looked at.
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


def choose(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(arm: Arm, column: str) -> float:
        return round(sum(run["arms"][arm.name]["curve"][-1][column] for run in runs) / len(runs), 4)

    overall = {arm.name: mean(arm, "overall") for arm in grid()}

    def best(name: str, beta: float) -> float:
        return max(LEARNING_RATES, key=lambda rate: overall[f"{name} | {beta} | {rate}"])

    beta = max(BETAS, key=lambda beta: sum(overall[f"{name} | {beta} | {best(name, beta)}"] for name in NEGATIVES))
    return {
        "validation": {arm.name: {c: mean(arm, c) for c in ("overall", "conflict", "next")} for arm in grid()},
        "beta": beta,
        "learning_rates": {name: best(name, beta) for name in NEGATIVES},
        "seeds": SEEDS,
    }


def main() -> None:
    scale: Scale = replace(SCALE, evaluations=1)
    result = choose(demo.run_seeds(SEEDS, grid(), scale, "validation", workers=2))
    (demo.RESULTS / "tuning.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
