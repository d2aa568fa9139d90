"""The formulas of the documentation in plain tensors of any dtype, written apart: nothing is imported from the package.

Gradients are autograd's. Each number of a result has a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_LENGTH = 1e-9
BOUNDS = {"released": (0.001, 1.0), "paper": (0.01, 1.0), "moment": (0.001, 1.0)}

# From hidden states or logits to log-probs.


def predicted(labels: Tensor, *, shift: bool, ignore: int, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Of flat labels of sequences that end at ``ends``: the position ``at`` that predicts each label that counts, and
    the label's own position ``of``."""
    at, of, start = [], [], 0
    for end in ends:
        for position in range(start, end):
            source = position - 1 if shift else position
            if source >= start and int(labels[position]) != ignore:
                at.append(source)
                of.append(position)
        start = end
    return torch.tensor(at, dtype=torch.long), torch.tensor(of, dtype=torch.long)


def sequences(of: Tensor, ends: list[int]) -> Tensor:
    """The sequence that each position lies in."""
    return torch.tensor([next(n for n, end in enumerate(ends) if i < end) for i in of.tolist()], dtype=torch.long)


def sums_of(z: Tensor, labels: Tensor, weights: Tensor, member: Tensor, N: int) -> dict[str, Tensor]:
    """``Σ w·log softmax(z)[y]`` of each sequence; a token of weight 0 does not count, whatever its log-prob."""
    logps = z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    counted = torch.where(weights == 0, torch.zeros_like(logps), weights * logps)
    zeros = torch.zeros(N, dtype=z.dtype)
    return {"sum": zeros.index_add(0, member, counted), "length": zeros.index_add(0, member, weights)}


def head_of(x: dict[str, Tensor], rows: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Raw products and logits of these positions: ``z = cap·tanh(y/cap)``, ``y = scale·(raw + bias)``."""
    h = x["hidden"][rows]
    raw = h @ x["weight"].T
    if "lora_A" in x:
        raw = raw + o["lora_scale"] * (h @ x["lora_A"].T) @ x["lora_B"].T
    y = raw + x["bias"] if "bias" in x else raw
    if o["logit_scale"] is not None:
        y = y * o["logit_scale"]
    return raw, y if o["softcap"] is None else o["softcap"] * torch.tanh(y / o["softcap"])


def statistics_of(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    p = z.softmax(-1)
    others = z.scatter(1, labels[:, None], -torch.inf).amax(1)
    return {
        "entropy": -torch.special.xlogy(p, p).sum(1), "mean_logits": z.mean(1),
        "lead": z.gather(1, labels[:, None])[:, 0] - others,
    }  # fmt: skip


# From log-probs to losses.


@dataclass(frozen=True)
class Negative:
    estimator: str = "released"
    alpha: float = 0.01
    margin: str = "sum"
    q: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Of all negatives, in the order of the rows."""

    negatives: list[Negative]
    dynamic: bool = False
    average: bool = False
    sft: float = 0.0
    q_from: str = "rank_means"
    decay: float = 0.0


def paper_named(estimator: str) -> dict[str, Negative]:
    """The three negatives of the paper, with its α and margins: docs/method.md."""
    return {
        "rejected": Negative(estimator, q=0.0, weight=0.04),
        "question_only": Negative(estimator, 0.5, "mean", weight=0.48),
        "image_only": Negative(estimator, 0.01, "sum", weight=0.48),
    }


def box_cox(x: Tensor, q: Tensor) -> Tensor:
    """``(1 − σ(x)^q)/q``, and DPO where q = 0. The value is expm1's, which does not cancel, and the slope that of
    ``−σ(x)^q/q``, which autograd would take from expm1 as ``1 + expm1``."""
    log_p = torch.nn.functional.logsigmoid(x)
    dpo = q < 1e-30
    positive = torch.where(dpo, torch.ones_like(q), q)
    value = -torch.expm1(positive * log_p).detach() / positive
    slope = -torch.exp(positive * log_p) / positive
    return torch.where(dpo, -log_p, value + (slope - slope.detach()))


def rows_of(x: Tensor) -> Tensor:
    """``[B]`` as ``[1, B]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def moments_of(parts: list[Tensor], q_from: str, masks: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and mean square over the last dimension, of the pairs that count; of several ranks, of which some have
    nothing."""
    if q_from == "each_pair":
        x = counted(None if masks is None else masks[0], parts[0])
        return x, x**2
    if masks is not None:
        every = zip(parts, masks, strict=True)
        each = [zip(rows_of(x), rows_of(m.expand(x.shape)), strict=True) for x, m in every]
        rows = [moments_of([x[m] for x, m in row], q_from) for row in zip(*each, strict=True)]
        mean, square = (torch.stack(row).view(parts[0].shape[:-1]) for row in zip(*rows, strict=True))
        return mean, square
    given = [x for x in parts if x.shape[-1]]
    if not given:
        zero = parts[0].new_zeros(parts[0].shape[:-1])
        return zero, zero
    if q_from == "all_pairs":
        given = [torch.cat(given, -1)]
    mean = torch.stack([x.mean(-1) for x in given]).mean(0)
    return mean, torch.stack([(x**2).mean(-1) for x in given]).mean(0)


def smoothed(now: Tensor, before: Tensor | None, decay: float) -> Tensor:
    """An infinite or NaN history is none."""
    if before is None:
        return now
    return decay * torch.where(before.isfinite(), before, now) + (1 - decay) * now


def q_of(mean: Tensor, square: Tensor, estimator: str, alpha: Any, bounds: tuple[float, float]) -> Tensor:
    if estimator == "moment":
        rms = square.sqrt()
        q = torch.where((rms == 0) | rms.isinf(), torch.ones_like(rms), 1 - mean / rms)
    else:
        # 1 − σ(x) as σ(−x): the same number, without its cancellation
        q = (2 if estimator == "released" else 1) * torch.sigmoid(-alpha * mean)
    return q.clamp(*bounds)


def counted(counts: Tensor | None, x: Tensor) -> Tensor:
    """0 for pairs that do not count; its gradient is 0 there, too, whatever comes back."""
    return x if counts is None else torch.where(counts, x, 0.0)


def mask_of(x: dict[str, Tensor]) -> Tensor | None:
    """One mask of those that are given: a pair counts that all of them count."""
    masks = [x[name] != 0 for name in ("pair_mask", "chosen_mask") if name in x]
    return masks[0] & masks[-1] if masks else None


def only_counted(x: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Which pairs count, ``[K, B]``, and the tensors with zeros, of length 1, for those that do not."""
    mask = mask_of(x)
    if mask is None:
        return None, x
    counts = mask.expand(x["policy_rejected"].shape)
    found = dict(x)
    for side, mask in (("chosen", counts.any(0)), ("rejected", counts)):
        for name, other in ((f"policy_{side}", 0.0), (f"reference_{side}", 0.0), (f"{side}_length", 1.0)):
            if name in x:
                found[name] = torch.where(mask, x[name], other)
    return counts, found


def margins(x: dict[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """Log-ratios and margins of the loss, and those that q is read from: ``[K, B]``."""
    chosen, rejected = x["policy_chosen"], x["policy_rejected"]
    if "reference_chosen" in x:
        chosen, rejected = chosen - x["reference_chosen"], rejected - x["reference_rejected"]
    psi = chosen - rejected
    by_mean = psi
    if "chosen_length" in x:
        means = chosen / x["chosen_length"].clamp_min(MIN_LENGTH), rejected / x["rejected_length"].clamp_min(MIN_LENGTH)
        by_mean = means[0] - means[1]
        if s.average:
            (chosen, rejected), psi = means, by_mean
    rows = [by_mean if n.margin == "mean" and n.q is None else psi for n in s.negatives]
    seen = torch.stack([row[k] for k, row in enumerate(rows)])
    return {"chosen": chosen, "rejected": rejected, "psi": psi, "seen": psi if s.average else seen}


def napo(
    ranks: list[dict[str, Tensor]], s: Settings, beta: Tensor, *, rank: int = 0, given: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses ``[B]``, rewards, q, weights and moments of one rank; ``given``: means ``[3, K]`` of a larger batch."""
    masks, ranks = zip(*map(only_counted, ranks), strict=True)
    x, counts = ranks[rank], masks[rank]
    masks = None if counts is None else masks
    found = [margins(other, s) for other in ranks]
    m = found[rank]
    with torch.no_grad():
        if given is None:
            moments = torch.stack(moments_of([f["seen"].detach() for f in found], s.q_from, masks))
            moments = smoothed(moments, x.get("previous"), s.decay)
            learned = moments_of(
                [f["psi"].detach() for f in found], "all_pairs" if s.q_from == "all_pairs" else "rank_means", masks
            )[0]
        else:
            moments, learned = given[:2], given[2]
        q = []
        for k, n in enumerate(s.negatives):
            mean, square = moments[:, k]
            alpha = n.alpha * beta if n.estimator == "paper" else n.alpha
            fixed = torch.full_like(mean, n.q or 0.0)
            q.append(fixed if n.q is not None else q_of(mean, square, n.estimator, alpha, BOUNDS[n.estimator]))
        q = torch.stack(q) + x.get("nudge_q", 0)
        weights = torch.tensor([n.weight for n in s.negatives], dtype=q.dtype)
        if s.dynamic:
            gain = learned.clamp(0, 1e30) + 0.05
            weights = (gain / gain.sum()).clamp_min(0.01) + x.get("nudge_weights", 0)
    psi = counted(counts, m["psi"])  # q may be NaN, and then the gradient
    rows = box_cox(beta * psi, q if q.dim() == 2 else q[:, None].expand_as(psi))
    present = torch.ones_like(weights) if s.dynamic else weights
    rows = torch.where(present[:, None] == 0, torch.zeros_like(rows), weights[:, None] * rows)
    losses = counted(counts, rows).sum(0)
    if s.sft:
        policy = x["policy_chosen"]
        if s.average:
            policy = policy / x["chosen_length"].clamp_min(MIN_LENGTH)
        losses = losses - s.sft * policy
    return {
        "losses": losses, "chosen_rewards": beta * m["chosen"].detach(),
        "rejected_rewards": beta * m["rejected"].detach(), "q": q, "weights": weights,
        "moments": moments, "learned": learned,
    }  # fmt: skip


def fixed_q(x: dict[str, Tensor], beta: Tensor) -> dict[str, Tensor]:
    """The loss with a q that is given; NaN where it is not in [0, 1]."""
    counts, x = only_counted(x)
    chosen, rejected = x["policy_chosen"], x["policy_rejected"]
    if "reference_chosen" in x:
        chosen, rejected = chosen - x["reference_chosen"], rejected - x["reference_rejected"]
    psi = counted(counts, chosen - rejected)
    q = x["q"].detach().expand_as(psi)
    q = torch.where((q >= 0) & (q <= 1), q, torch.nan)
    return {
        "losses": counted(counts, box_cox(beta * psi, q)), "chosen_rewards": (beta * chosen).detach(),
        "rejected_rewards": (beta * rejected).detach(),
    }  # fmt: skip
