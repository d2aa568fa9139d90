"""The same contract, eager and obvious, in any dtype: the measuring stick, and a text to read beside the paper.

Nothing here is fused, chunked or clever; every function is differentiable any number of times. Tests run it in
float64 and compare everything else with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from napo_loss.types import LowRank, SequenceLogps


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
) -> SequenceLogps:
    """``sum_n = Σ_t w_nt·log softmax(x_nt)[y_nt]`` over active positions; see :func:`napo_loss.sequence_logps`.

    Example:
        >>> import torch
        >>> from napo_loss.reference import sequence_logps
        >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 0]]))
        SequenceLogps(sum=tensor([-2.7726]), length=tensor([2.]))
    """
    weights = torch.ones_like(labels, dtype=logits.dtype) if token_weights is None else token_weights
    if shift:
        logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    sums, lengths = [], []
    for row, label, weight in zip(logits, labels, weights, strict=True):
        active = label != ignore_index
        target = label[active].long()
        logps = row[active].log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        sums.append((weight[active] * logps).sum())
        lengths.append(weight[active].sum())
    return SequenceLogps(torch.stack(sums), torch.stack(lengths))


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor | LowRank,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    **kwargs,
) -> SequenceLogps:
    """:func:`sequence_logps` of all the logits; see :func:`napo_loss.linear_sequence_logps`.

    Example:
        >>> import torch
        >>> from napo_loss.reference import linear_sequence_logps
        >>> linear_sequence_logps(torch.ones(1, 3, 2), torch.zeros(4, 2), torch.tensor([[-100, 2, 0]]))
        SequenceLogps(sum=tensor([-2.7726]), length=tensor([2.]))
    """
    if isinstance(weight, LowRank):
        weight = weight.weight + weight.scale * weight.lora_B @ weight.lora_A
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return sequence_logps(logits, labels, **kwargs)


def noise_level(
    margin: Tensor, alpha: float = 0.01, estimator: str = "released", pair_mask: Tensor | None = None
) -> Tensor:
    """q as the released code runs it, as the paper prints it (with β in the margin), or by moments; of the pairs that
    count, where a mask shaped as the margin says which.

    Example:
        >>> import torch
        >>> from napo_loss.reference import noise_level
        >>> margin = torch.tensor([4.0, -2.0])
        >>> noise_level(margin, 0.5), noise_level(margin, 0.5, "paper"), noise_level(margin, estimator="moment")
        (tensor(0.7551), tensor(0.3775), tensor(0.6838))
    """
    margin = margin.detach()
    if pair_mask is not None:
        counted = [m[keep] for m, keep in zip(torch.atleast_2d(margin), torch.atleast_2d(pair_mask), strict=True)]
        levels = [noise_level(m if len(m) else m.new_zeros(1), alpha, estimator) for m in counted]
        return torch.stack(levels).view(margin.shape[:-1])
    mean = margin.mean(-1)
    if estimator == "released":
        return (2 * (1 - torch.sigmoid(alpha * mean))).clamp(0.001, 1)
    if estimator == "paper":
        return (1 - torch.sigmoid(alpha * mean)).clamp(0.01, 1)
    rms = (margin**2).mean(-1).sqrt()
    return torch.where(rms == 0, 1, 1 - mean / rms).clamp(0.001, 1)


def noise_aware_dpo_loss(margin: Tensor, beta: float, q: float, pair_mask: Tensor | None = None) -> Tensor:
    """``(1 − σ(βψ)^q)/q``, and ``−log σ(βψ)`` for ``q = 0``: as printed in the paper; 0 for a pair that is masked.

    Example:
        >>> import torch
        >>> from napo_loss.reference import noise_aware_dpo_loss
        >>> noise_aware_dpo_loss(torch.zeros(1), beta=0.1, q=1.0)
        tensor([0.5000])
    """
    if pair_mask is not None:
        losses = torch.zeros_like(margin)
        losses[pair_mask] = noise_aware_dpo_loss(margin[pair_mask], beta, q)
        return losses
    if q == 0:
        return -torch.nn.functional.logsigmoid(beta * margin)
    return (1 - torch.sigmoid(beta * margin) ** q) / q
