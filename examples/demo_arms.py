"""What the demo compares, and on which scale. β and learning rates are those that ``demo_tune.py`` chose."""

from __future__ import annotations

from demo_train import Arm, Scale

FIXED_WEIGHTS = {"rejected": 0.04, "question_only": 0.48, "image_only": 0.48}
BY_MEAN, BY_SUM = {"alpha": 0.5, "margin": "mean"}, {"alpha": 0.01, "margin": "sum"}
NEGATIVES = {
    "DPO": {"rejected": {"q": 0.0}},
    "DPO, all negatives": {name: {"q": 0.0, "weight": weight} for name, weight in FIXED_WEIGHTS.items()},
    "NaPO": {
        "rejected": {"q": 0.0, "weight": 0.04},
        "question_only": {**BY_MEAN, "weight": 0.48},
        "image_only": {**BY_SUM, "weight": 0.48},
    },
    "DPO, all negatives, equal weights": {name: {"q": 0.0, "weight": 1 / 3} for name in FIXED_WEIGHTS},
    "NaPO, equal weights": {
        "rejected": {**BY_MEAN, "weight": 1 / 3},
        "question_only": {**BY_MEAN, "weight": 1 / 3},
        "image_only": {**BY_SUM, "weight": 1 / 3},
    },
}
"""``DPO`` sees the rejected alone; ``all negatives`` the biased ones too: q = 0 shows what these bring by themselves.
``NaPO`` has the q that the released code runs, the printed α, and fixed weights that are one of the triples among the
released code's commented-out runs; dynamic weights, the paper's main result, are not tried here. ``equal weights``: a
third each, and the rejected are noise-aware too."""

CHOSEN = {
    "DPO": (0.1, 3e-4),
    "DPO, all negatives": (0.3, 1e-4),
    "NaPO": (1.0, 1e-3),
    "DPO, all negatives, equal weights": (0.3, 1e-3),
    "NaPO, equal weights": (0.3, 3e-4),
}
"""β and learning rate of each arm: its own best on validation pictures, see ``demo_tune.py``."""
ARMS = [Arm(name, negatives, CHOSEN[name][1], CHOSEN[name][0]) for name, negatives in NEGATIVES.items()]

SCALE = Scale(pretrain_steps=200, cue=0.98, pairs=1200, flipped=0.25, steps=160, batch=32, evaluations=4)
QUICK = Scale(pretrain_steps=20, cue=0.97, pairs=40, flipped=0.25, steps=4, batch=8, evaluations=2)
