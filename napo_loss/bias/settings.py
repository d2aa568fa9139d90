"""How biased negatives are made, beside which and from what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

KINDS = ("question_only", "image_only")
ImageRemoval = Literal["mask", "noise", "blank", "crop", "omit"]
QUESTION = r"(?s)^(?:.*?\b(?:USER|Question):)?(?P<question>.*?)(?:\b(?:ASSISTANT|Answer):)?\s*$"
"""What a plain-text prompt asks: all of it, without the role markers of the usual plain-text templates."""


@dataclass(frozen=True)
class BiasSettings:
    """How the negatives are made, beside which and from what. The defaults are ours.

    The paper prints that all visual, or all textual, information is masked, and does not say how.

    Attributes:
        instruction: the neutral text that replaces the question for ``image_only``; ``None``: no text in its place.
        max_new_tokens: length of an answer.
        temperature: 0 takes the likeliest answer; above, answers are sampled with one seed per batch.
        seed: of noise, crops and sampling.
        crop_area: smallest and largest share of the area that ``"crop"`` keeps; these are the released helper's.
        question_pattern: regular expression whose group ``question`` is the question in a plain-text prompt.
        num_beams: width of the beam search; 1 is none. Beams are compared by their mean log-prob per token.
        image_removal: what ``question_only`` sees. ``"mask"``: every pixel at the image's mean colour;
            ``"blank"``: black; ``"noise"``: uniform noise; ``"crop"``: a random crop with 1-20 % of the area,
            resized back, which leaves some information (the released code has such a helper and never calls it);
            ``"omit"``: no image at all, the model gets the text without the image's placeholders.

    Raises:
        ValueError: for a value outside of its range, named.
    """

    instruction: str | None = "Describe the image."
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    crop_area: tuple[float, float] = (0.01, 0.20)
    question_pattern: str = QUESTION
    num_beams: int = 1
    image_removal: ImageRemoval = "mask"

    @classmethod
    def released(cls) -> BiasSettings:
        """What the released code runs (its script for LLaVA-1.5-7B), and we have not.

        ``question_only`` gets no image token, ``image_only`` the image and no text; 3 beams, temperature 0, 1024 new
        tokens. LLaVA-1.5's system prompt and role markers stay in both: they are the template's, not the question's.

        Example:
            >>> BiasSettings.released().image_removal, BiasSettings.released().instruction
            ('omit', None)
        """
        return cls(instruction=None, max_new_tokens=1024, temperature=0.0, num_beams=3, image_removal="omit")

    def __post_init__(self):
        if self.instruction is not None and not self.instruction.strip():
            raise ValueError("BiasSettings.instruction must be a text, or None for the image without any text")
        for name in ("max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"BiasSettings.{name} must be an integer >= 1, got {value!r}")
        if not self.temperature >= 0:
            raise ValueError(f"BiasSettings.temperature must be >= 0, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"BiasSettings.seed must be >= 0, got {self.seed}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"BiasSettings.crop_area must rise within (0, 1], got {self.crop_area}")
        if "question" not in re.compile(self.question_pattern).groupindex:
            raise ValueError("BiasSettings.question_pattern needs a group named 'question'")
        if self.image_removal not in get_args(ImageRemoval):
            raise ValueError(f"BiasSettings.image_removal must be in {get_args(ImageRemoval)}: {self.image_removal!r}")
