"""What a step logs: TRL's metrics and those of each negative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from napo_loss.types import NaPOOutput, SequenceLogps

Share = tuple[Tensor, Tensor]
"""A sum and what it is to be divided by, so that it can be added over ranks."""


def of_pairs(out: NaPOOutput, chosen: SequenceLogps, rejected: SequenceLogps, names: list[str]) -> dict[str, Share]:
    """Rewards, log-probs, q and weights: of the chosen ``[B]``, of all negatives and of each of them ``[K, B]``."""
    margins = out.chosen_rewards - out.rejected_rewards
    metrics = {
        "rewards/chosen": total(out.chosen_rewards),
        "rewards/margins": total(margins),
        "rewards/accuracies": total(margins > 0),
        "logps/chosen": total(chosen.sum),
    }
    for k, name in enumerate(names):
        metrics |= {
            f"rewards/{name}": total(out.rejected_rewards[k]),
            f"rewards/margins/{name}": total(margins[k]),
            f"rewards/accuracies/{name}": total(margins[k] > 0),
            f"logps/{name}": total(rejected.sum[k]),
            f"napo/q/{name}": total(out.q[k]),
            f"napo/weight/{name}": total(out.weights[k]),
        }
    return metrics


def of_tokens(logps: SequenceLogps, B: int) -> dict[str, Share]:
    """TRL's metrics of tokens; those that do not count are 0 in the statistics. The first B rows are the chosen."""
    entropy, is_top1, mean_logits = logps.tokens  # pyright: ignore[reportGeneralTypeIssues]
    counted = logps.length.float()
    chosen, rejected = counted[:B].sum(), counted[B:].sum()
    return {
        "entropy": (entropy.sum(), chosen + rejected),
        "logits/chosen": (mean_logits[:B].sum(), chosen),
        "logits/rejected": (mean_logits[B:].sum(), rejected),
        "mean_token_accuracy": (is_top1[:B].sum(), chosen),
    }


def total(x: Tensor) -> Share:
    """Sum and count, both on the device of ``x``: a count copied there from the host would wait for the device."""
    amount = x.detach().float().sum()
    return amount, torch.full_like(amount, x.numel())


def over_ranks(metrics: Mapping[str, Share], accelerator: Any) -> dict[str, tuple[float, float]]:
    """Sums and counts of all ranks: one reduction, and one wait for the device."""
    packed = torch.stack([torch.stack([part.float() for part in share]) for share in metrics.values()])
    rows = accelerator.reduce(packed, "sum").tolist()
    return {name: (amount, count) for name, (amount, count) in zip(metrics, rows, strict=True)}
