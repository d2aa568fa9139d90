"""One run: a loss on the pairs of a seed, looked at after some of its epochs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.noise_study import tasks
from examples.noise_study.losses import GROUPS, LOSSES, State
from examples.noise_study.model import answers, pretrained, to_train
from examples.noise_study.pairs import Pairs, make_pairs
from napo_loss import likely_swapped, noise_level, sequence_logps

BATCH, WARM_UP = 32, 10
HELD_OUT = 150  # questions of validation and of test each
MICRO_BATCHES = (2, 8, 32)  # over which the moment estimate is averaged, to see what few pairs make of it


@dataclass(frozen=True)
class Run:
    """One line of the plan, and the key of its rows in the CSV."""

    task: str
    noise: str
    rate: float
    loss: str
    beta: float
    learning_rate: float
    seed: int
    pairs: int = 320
    epochs: tuple[int, ...] = (1, 2, 4, 8)  # those after which it is looked at

    @property
    def key(self) -> tuple[str, ...]:
        numbers = f"{self.rate:g}", self.loss, f"{self.beta:g}", f"{self.learning_rate:g}", str(self.seed)
        return (self.task, self.noise, *numbers)


def train_all(runs: list[Run]) -> list[tuple[Run, list[dict[str, Any]]]]:
    """Those that share a model and its pairs, in a process of one thread."""
    torch.set_num_threads(1)
    return [(run, train(run)) for run in runs]


def train(run: Run) -> list[dict[str, Any]]:
    """A row for each epoch that is looked at."""
    base = pretrained(run.task, run.seed)
    pairs = _pairs(run.task, run.noise, run.rate, run.seed, run.pairs)
    loss = (LOSSES | GROUPS)[run.loss]
    terms = 3 if run.loss in GROUPS else 2  # sequences of a pair that the loss reads
    state = State(run.beta, swap_rate=run.rate / 2 if run.noise == "right" else run.rate)
    model, generator = to_train(base), torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=0.0)
    rows, step, used = [], 0, []
    for epoch in range(1, run.epochs[-1] + 1):
        used = []
        for i in torch.randperm(run.pairs, generator=generator).split(BATCH):
            optimizer.param_groups[0]["lr"] = run.learning_rate * min(1, (step + 1) / WARM_UP)
            state.lengths = (pairs.labels[:terms, i] != -100).sum(-1)
            losses, q = loss(logps(model, pairs, i, terms), pairs.reference[:terms, i], state)
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            used.append(q)
            step += 1
        if epoch in run.epochs:
            rows.append({"epoch": epoch, "q": float(np.mean(used)), **look(model, run, pairs)})
    return rows


@lru_cache(4)
def _pairs(task: str, noise: str, rate: float, seed: int, n: int) -> Pairs:
    return make_pairs(task, pretrained(task, seed), n, noise, rate, seed)


@lru_cache(4)
def _held_out(task: str, split: str) -> tasks.Questions:
    """The same for all."""
    return tasks.questions(task, split, HELD_OUT, np.random.default_rng(7))


def logps(model: nn.Module, pairs: Pairs, i: Tensor, terms: int) -> Tensor:
    """``[terms, len(i)]``, nats."""
    given = pairs.asked.given[i].repeat(terms, *[1] * (pairs.asked.given.dim() - 1))
    logits = model(given, pairs.ids[:terms, i].flatten(0, 1))
    return sequence_logps(logits, pairs.labels[:terms, i].flatten(0, 1)).sum.view(terms, len(i))


@torch.no_grad()
def look(model: nn.Module, run: Run, pairs: Pairs) -> dict[str, Any]:
    """How it answers questions it has not seen, and what estimators say of the margins that it has by now."""
    ratio = logps(model, pairs, torch.arange(run.pairs), 2) - pairs.reference[:2]
    margin, noisy = ratio[0] - ratio[1], int(pairs.noisy.sum())
    found: dict[str, Any] = {}
    asked = [_held_out(run.task, split) for split in ("valid", "test")]
    said = answers(model, torch.cat([questions.given for questions in asked]))
    found["valid"] = tasks.accuracy(said[:HELD_OUT], asked[0].right)
    found["test"] = tasks.accuracy(said[HELD_OUT:], asked[1].right)
    found |= {"margin": float(margin.mean()), "chosen": float(ratio[0].mean())}
    found["fitted_noise"] = float((margin[pairs.noisy] > 0).float().mean()) if noisy else float("nan")
    found["q_released"] = float(noise_level(margin))
    found["q_moment"] = float(noise_level(margin, estimator="moment"))
    for size in MICRO_BATCHES:
        parts = margin[: run.pairs // size * size].view(-1, size)
        found[f"q_moment_of_{size}"] = float(noise_level(parts, estimator="moment").mean())
    found["precision"] = float(pairs.noisy[likely_swapped(margin, noisy)].float().mean()) if noisy else float("nan")
    return found
