"""What is compared: a loss takes policy and reference log-probs of one batch and gives losses and the q it used.

From the papers: cDPO and rDPO (arXiv:2403.00409) are told the true rate of swaps, IPO is arXiv:2310.12036, Dr.DPO
arXiv:2407.07880 with β′ = 1. The rest is this library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from napo_loss import (
    RELEASED,
    Moments,
    Negative,
    Recipe,
    SequenceLogps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
)

DECAY = 0.9  # of moments that are smoothed, as NaPOConfig has it


@dataclass
class State:
    """What a loss may know beside the batch, and what it keeps between batches."""

    beta: float
    swap_rate: float  # the true one: only cDPO and rDPO look
    moments: Moments | None = None
    stacked: Tensor | None = None  # moments of several negatives
    lengths: Tensor | None = None  # [3, B], of the batch


Logps = Tensor  # [3, B]: chosen, rejected, blind
Loss = Callable[[Logps, Logps, State], tuple[Tensor, float]]


def _margin(policy: Logps, reference: Logps) -> Tensor:
    ratio = policy - reference
    return ratio[0] - ratio[1]


def _with_q(q: Callable[[Tensor, State], Tensor | float]) -> Loss:
    def loss(policy: Logps, reference: Logps, state: State) -> tuple[Tensor, float]:
        found = q(_margin(policy, reference).detach(), state)
        out = noise_aware_dpo_loss(policy[0], policy[1], reference[0], reference[1], beta=state.beta, q=found)
        return out.losses, float(found)

    return loss


def _moment(decay: float = DECAY, map_q: Callable[[Tensor], Tensor] = lambda q: q) -> Loss:
    def q(margin: Tensor, state: State) -> Tensor:
        state.moments = margin_moments(margin, previous=state.moments, decay=decay)
        return map_q(noise_level(state.moments, estimator="moment")).clamp(0, 1)

    return _with_q(q)


def _swap_aware(combine: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    def loss(policy: Logps, reference: Logps, state: State) -> tuple[Tensor, float]:
        h = state.beta * _margin(policy, reference)
        return combine(-F.logsigmoid(h), -F.logsigmoid(-h), state.swap_rate), float("nan")

    return loss


def _ipo(policy: Logps, reference: Logps, state: State) -> tuple[Tensor, float]:
    return (_margin(policy, reference) - 1 / (2 * state.beta)) ** 2, float("nan")


def _dr_dpo(policy: Logps, reference: Logps, state: State) -> tuple[Tensor, float]:
    losses = -F.logsigmoid(state.beta * _margin(policy, reference))
    shared = -(torch.logsumexp(-losses, 0) - torch.tensor(float(len(losses))).log())
    return shared.expand_as(losses), float("nan")


def _group(recipe: Recipe) -> Loss:
    """Two negatives a question: the sampled one and what the model says without looking."""

    def loss(policy: Logps, reference: Logps, state: State) -> tuple[Tensor, float]:
        assert state.lengths is not None  # every training step sets them
        said = [SequenceLogps(x, n) for x, n in zip(policy, state.lengths, strict=True)]
        out = napo_loss(
            said[0], {"rejected": said[1], "question_only": said[2]}, reference[0],
            {"rejected": reference[1], "question_only": reference[2]}, beta=state.beta, recipe=recipe,
            previous_moments=state.stacked,
        )  # fmt: skip
        state.stacked = out.moments
        return out.losses, float(out.q[0])

    return loss


PLAIN, MOMENT = Negative(q=0.0, weight=0.5), Negative(estimator="moment", weight=0.5)
BLIND = replace(RELEASED.named["question_only"], weight=0.5)


LOSSES: dict[str, Loss] = {
    "DPO": _with_q(lambda *_: 0.0),
    "cDPO": _swap_aware(lambda right, wrong, e: (1 - e) * right + e * wrong),
    "rDPO": _swap_aware(lambda right, wrong, e: ((1 - e) * right - e * wrong) / (1 - 2 * e)),
    "IPO": _ipo,
    "Dr.DPO": _dr_dpo,
    "q = 0.3": _with_q(lambda *_: 0.3),
    "q = 0.7": _with_q(lambda *_: 0.7),
    "q = 1": _with_q(lambda *_: 1.0),
    "released": _with_q(lambda margin, _: noise_level(margin)),
    "paper": _with_q(lambda margin, state: noise_level(state.beta * margin, estimator="paper")),
    "moment": _moment(),
    "moment, one batch": _moment(decay=0.0),
    "moment, 2q": _moment(map_q=lambda q: 2 * q),
    "moment, √q": _moment(map_q=torch.sqrt),
    "moment, q²": _moment(map_q=torch.square),
}
"""Of one negative. ``released`` and ``paper`` have α = 0.01, which the paper prints for sums."""

GROUPS: dict[str, Loss] = {
    "all q = 0": _group(Recipe({"rejected": PLAIN, "question_only": PLAIN})),
    "blind aware": _group(Recipe({"rejected": PLAIN, "question_only": BLIND})),
    "blind aware, dynamic": _group(Recipe({"rejected": PLAIN, "question_only": BLIND}, weights="dynamic")),
    "all moment": _group(Recipe({"rejected": MOMENT, "question_only": MOMENT}, decay=DECAY)),
    "all moment, dynamic": _group(
        Recipe({"rejected": MOMENT, "question_only": MOMENT}, weights="dynamic", decay=DECAY)
    ),
}
"""Of two negatives, by which terms are noise-aware and how they are weighed."""
