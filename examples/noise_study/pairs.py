"""Preferences of a model's own making, and three kinds of noise in them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.noise_study import tasks
from examples.noise_study.model import answers
from napo_loss import sequence_logps

NOISE = ("swapped", "close", "right")
"""``swapped``: chosen and rejected, of any pair alike. ``close``: the same, likelier where the model hardly tells the
two apart. ``right``: the rejected answer is right too, in its other form."""


class Pairs(NamedTuple):
    """Answers of ``n`` questions; the second negative is what the model says without looking."""

    asked: tasks.Questions
    ids: Tensor  # [3, n, LENGTH]: chosen, rejected, blind
    labels: Tensor  # [3, n, LENGTH]
    reference: Tensor  # [3, n], nats
    noisy: Tensor  # [n], bool


def make_pairs(task: str, model: nn.Module, n: int, noise: str, rate: float, seed: int) -> Pairs:
    """The right answer over one that the model samples. The noise of a seed is the same for all losses."""
    rng, generator = np.random.default_rng(100 + seed), torch.Generator().manual_seed(seed)
    asked = tasks.questions(task, "pairs", n, rng)
    commas = rng.random(n) < 0.5
    chosen = [tasks.spell(d, c) for d, c in zip(asked.right, commas, strict=True)]
    rejected = answers(model, asked.given, 1.0, generator)
    blind = answers(model, torch.zeros_like(asked.given), 1.0, generator)
    other = [tasks.spell(d, not c) for d, c in zip(asked.right, commas, strict=True)]
    for negatives in (rejected, blind):
        for i, digits in enumerate(asked.right):
            if negatives[i] in (chosen[i], other[i]):  # a right sample teaches nothing: one digit is made wrong
                wrong, k = digits.copy(), rng.integers(tasks.DIGITS)
                wrong[k] = (wrong[k] + rng.integers(1, 10)) % 10
                negatives[i] = tasks.spell(wrong, bool(commas[i]))
    closeness = np.ones(n)
    if noise == "close":
        logps = _logps(model, asked.given, [chosen, rejected]).numpy()
        closeness = np.exp(-np.abs(logps[0] - logps[1]) / 2)
    noisy = np.zeros(n, dtype=bool)
    noisy[rng.choice(n, round(rate * n), replace=False, p=closeness / closeness.sum())] = True
    for i in np.flatnonzero(noisy):
        if noise == "right":
            rejected[i] = other[i]
        else:
            chosen[i], rejected[i] = rejected[i], chosen[i]
    ids, labels = zip(*(tasks.encode(answer) for answer in (chosen, rejected, blind)), strict=True)
    reference = _logps(model, asked.given, [chosen, rejected, blind])
    return Pairs(asked, torch.stack(ids), torch.stack(labels), reference, torch.from_numpy(noisy))


@torch.no_grad()
def _logps(model: nn.Module, given: Tensor, said: list[list[str]]) -> Tensor:
    """``[len(said), n]``, nats."""
    found = []
    for texts in said:
        ids, labels = tasks.encode(texts)
        found.append(sequence_logps(model(given, ids), labels).sum)
    return torch.stack(found)
