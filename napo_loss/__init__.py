"""Noise-Aware Preference Optimization (CVPR 2025, arXiv:2503.17928) as a standalone loss."""

import os as _os

from napo_loss._version import __version__
from napo_loss.hf.head import fused_head
from napo_loss.logps.linear import linear_sequence_logps
from napo_loss.logps.logits import sequence_logps
from napo_loss.objective.estimators import Moments, likely_swapped, margin_moments, noise_level
from napo_loss.objective.loss import napo_loss, noise_aware_dpo_loss
from napo_loss.objective.module import NaPOLoss
from napo_loss.objective.recipes import PAPER, RELEASED, SCALE_FREE, Negative, Recipe
from napo_loss.parallel.reductions import all_reduce_logps
from napo_loss.types import (
    LowRank,
    MaskedLogps,
    NaPOOutput,
    PreferenceLoss,
    SequenceLogps,
    TokenStatistics,
    VocabShard,
)

# An unpacked sdist lacks the link napo_loss/kernels, a checkout without symbolic links (Windows) has a text file there.
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")):
    __path__.append(_os.path.dirname(__path__[0]))  # where `kernels` lies

__all__ = [
    "PAPER",
    "RELEASED",
    "SCALE_FREE",
    "LowRank",
    "MaskedLogps",
    "Moments",
    "NaPOLoss",
    "NaPOOutput",
    "Negative",
    "PreferenceLoss",
    "Recipe",
    "SequenceLogps",
    "TokenStatistics",
    "VocabShard",
    "__version__",
    "all_reduce_logps",
    "fused_head",
    "likely_swapped",
    "linear_sequence_logps",
    "margin_moments",
    "napo_loss",
    "noise_aware_dpo_loss",
    "noise_level",
    "sequence_logps",
]
