"""What the demo compares, and on which scale. β and learning rates are those that ``tune`` chose."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from examples.demo.training import Arm, Scale
from napo_loss import RELEASED

FOLDER = Path(__file__).parents[1] / "results"
PLAIN = {name: asdict(replace(negative, q=0.0)) for name, negative in RELEASED.named.items()}
CONFIGS = {
    "DPO": {"negatives": {"rejected": {"q": 0.0}}},
    "moment q": {"negatives": {"rejected": {"estimator": "moment"}}, "q_decay": 0.9},
    "three negatives, q = 0": {"negatives": PLAIN, "negative_weights": "dynamic"},
    "RELEASED": {"method": "released"},
    "SCALE_FREE": {"method": "scale_free", "q_decay": 0.9},
}
"""The first two see the rejected alone, the others the biased answers too, all with the same dynamic weights: ``q = 0``
shows what these answers bring by themselves. ``RELEASED`` reads q as the released code runs it, and none for the
rejected; ``moment q`` and ``SCALE_FREE`` read it from the moments of the margins."""


def chosen(file: Path = FOLDER / "demo-tuning.json") -> list[Arm]:
    """Each arm at its own best on validation questions, for all rates of swaps alike."""
    settings = json.loads(file.read_text())["chosen"]
    return [Arm(name, config, **settings[name]) for name, config in CONFIGS.items()]


SCALE = Scale(pretrain_steps=300, pairs=400, swapped=(0.0, 0.3), steps=80, batch=24, held_out=100)
QUICK = Scale(pretrain_steps=20, pairs=40, swapped=(0.0, 0.3), steps=4, batch=8, held_out=8)
