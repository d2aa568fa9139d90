"""How biased negatives are made, beside which and from what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

KINDS = ("question_only", "image_only")
ImageRemoval = Literal["mask", "noise", "blank", "crop"]
QUESTION = r"(?s)^(?:.*?\b(?:USER|Question):)?(?P<question>.*?)(?:\b(?:ASSISTANT|Answer):)?\s*$"
"""What a plain-text prompt asks: all of it, without the role markers of the usual plain-text templates."""


@dataclass(frozen=True)
class BiasSettings:
    """How the negatives are made, beside which and from what.

    Attributes:
        instruction: the neutral text that replaces the question for ``image_only``.
        max_new_tokens: length of an answer.
        temperature: 0 is greedy; above, answers are sampled with one seed per batch.
        seed: of noise, crops and sampling.
        crop_area: smallest and largest share of the area that ``"crop"`` keeps; these are the released helper's.
        question_pattern: regular expression whose group ``question`` is the question in a plain-text prompt.
    """

    instruction: str = "Describe the image."
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    crop_area: tuple[float, float] = (0.01, 0.20)
    question_pattern: str = QUESTION

    def __post_init__(self):
        if not self.instruction.strip():
            raise ValueError("BiasSettings.instruction must not be empty: the model has to be asked something")
        if self.max_new_tokens < 1:
            raise ValueError(f"BiasSettings.max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"BiasSettings.temperature must be >= 0, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"BiasSettings.seed must be >= 0, got {self.seed}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"BiasSettings.crop_area must rise within (0, 1], got {self.crop_area}")
        if "question" not in re.compile(self.question_pattern).groupindex:
            raise ValueError("BiasSettings.question_pattern needs a group named 'question'")
