"""Two tasks whose answers are spelled letter by letter, and the habit that a model is pre-trained into.

``pictures``: three scanned digits (8 × 8, scikit-learn's), to be named from left to right. The habit: 0 to 4 are called
5 to 9.
``text``: three digits as tokens, to be named in ascending order. The habit: they are named in the order given.

An answer is right in two forms, "two nine one" and "two,nine,one", so that a negative can be right and still differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "^$ ," + "".join(sorted(set("".join(WORDS))))
START, END = LETTERS.index("^"), LETTERS.index("$")
DIGITS = 3
LENGTH = 19  # "^three three seven$"
SPLITS = {"pretrain": (0.0, 0.4), "pairs": (0.4, 0.7), "valid": (0.7, 0.85), "test": (0.85, 1.0)}
HABIT = 0.6  # of the pre-training answers that the habit can reach have it


class Questions(NamedTuple):
    """What is asked, and the digits that are the right answer and the habitual one."""

    given: Tensor  # [n, DIGITS, 64] pictures, or [n, DIGITS] tokens
    right: np.ndarray  # [n, DIGITS]
    habitual: np.ndarray  # [n, DIGITS]

    def __getitem__(self, i) -> Questions:
        return Questions(self.given[i], self.right[i], self.habitual[i])


def questions(task: str, split: str, n: int, rng: np.random.Generator) -> Questions:
    """``n`` of a part of the pictures (or of the 1000 sequences) that no other split has."""
    if task == "pictures":
        images, digits = map(np.asarray, load_digits(return_X_y=True))
        at = rng.choice(_part(len(digits), split), (n, DIGITS))
        right = digits[at]
        return Questions(
            torch.tensor(images[at] / 16, dtype=torch.float32), right, np.where(right < 5, right + 5, right)
        )
    number = rng.choice(_part(1000, split), n)
    digits = np.stack([number // 100, number // 10 % 10, number % 10], 1)
    return Questions(torch.from_numpy(digits), np.sort(digits, 1), digits)


def _part(size: int, split: str) -> np.ndarray:
    first, last = SPLITS[split]
    return np.random.default_rng(0).permutation(size)[int(first * size) : int(last * size)]


def spell(digits: np.ndarray, commas: bool) -> str:
    return "^" + (", "[not commas]).join(WORDS[d] for d in digits) + "$"


def encode(answers: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[n, LENGTH]``; all but the first token are predicted."""
    ids = torch.full((len(answers), LENGTH), END)
    labels = torch.full((len(answers), LENGTH), -100)
    for row, answer in enumerate(answers):
        tokens = torch.tensor([LETTERS.index(letter) for letter in answer[:LENGTH]])
        ids[row, : len(tokens)], labels[row, 1 : len(tokens)] = tokens, tokens[1:]
    return ids, labels


def accuracy(answers: list[str], right: np.ndarray) -> float:
    """The share of digits that are named right, at their place."""
    words = [answer.strip("^$").replace(",", " ").split(" ") for answer in answers]
    hits = [
        word == WORDS[d] for row, digits in zip(words, right, strict=True) for word, d in zip(row, digits, strict=False)
    ]
    return sum(hits) / right.size
