"""Sequence log-probs from hidden states and the lm_head: check, shift, dispatch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from napo_loss.checks import (
    autocasts,
    check_backend,
    check_cu_seqlens,
    check_head,
    check_labels,
    check_like,
    check_positions,
    check_positive,
)
from napo_loss.logps import linear_ops
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.records import Head
from napo_loss.logps.tokens import Packing, per_sequence, targets
from napo_loss.parallel.shards import local_head
from napo_loss.types import LowRank, SequenceLogps, TokenStatistics, VocabShard


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor | LowRank | VocabShard,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    token_weights: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    logits_budget: int | None = None,
    max_active: int | None = None,
    token_statistics: bool = False,
    backend: Literal["auto", "triton", "eager"] = "auto",
) -> SequenceLogps:
    r"""Log-probability of each sequence's active tokens from hidden states, without ever storing the logits.

    ``sum_n = Σ_t w_nt·(z_nt[y_nt] − logsumexp(z_nt))`` over active positions, with
    ``z = softcap·tanh(x / softcap)`` and ``x = logit_scale·(hidden·weightᵀ + bias)``. Masked positions are not
    computed: their hidden states may hold anything, NaN included, and their gradient is exactly 0.

    Args:
        hidden: ``[N, T, D]``, float32, bfloat16, float16 or float64: the backbone's last hidden state, any strides.
        weight: ``[V, D]`` in hidden's dtype (under autocast both are cast, but no float64), or a
            :class:`napo_loss.LowRank`: a head with LoRA factors. Where the vocabulary is split over ranks: a DTensor
            with ``Shard(0)`` beside a DTensor ``hidden`` (replicated, or split along the same dimension: it is
            gathered), or a :class:`napo_loss.VocabShard` of this rank's rows, with the same ``hidden`` on every rank.
        labels: ``[N, T]``, int64 or int32, unshifted, ``ignore_index`` where a token does not count.
        bias: ``[V]``; split like ``weight``.
        softcap: Gemma's ``final_logit_softcapping``.
        logit_scale: Cohere's ``logit_scale``, ``1/logits_scaling`` for Granite, ``1/temperature``.
        token_weights: ``[N, T]``, aligned with ``labels``. Not differentiated.
        shift: ``False`` where position t predicts label t already.
        ignore_index: the label that does not count.
        cu_seqlens: ``[N + 1]``: sequences are packed into ``hidden [total, D]`` and ``labels [total]``, as in
            :func:`napo_loss.sequence_logps`.
        logits_budget: bytes of logits-sized memory that may exist at a time, what is kept for backward included.
            Default: a quarter of the GPU's free memory, an eighth of the free memory of a CPU. Of a split vocabulary:
            the same on every rank.
        max_active: at least the number of active positions. Then nothing waits for the GPU, and a CUDA graph can be
            captured (name a ``logits_budget``, too); this many positions are computed. Of more, every sum in which a
            token counts is NaN.
        token_statistics: also returns entropy, top-1 hit and mean logit of each position, from the same pass.
        backend: as in :func:`napo_loss.sequence_logps`.

    Returns:
        :class:`SequenceLogps`: ``sum [N]`` in nats and ``length [N]``, float32 (float64 for float64), and where
        ``token_statistics`` asks for them ``tokens``, :class:`TokenStatistics`.

    Raises:
        ValueError: on mismatched shapes or devices, an empty batch, a label outside the vocabulary (on a GPU: NaN in
            that sequence's sum), an empty weight (a ZeRO-3 shard).
        TypeError: on other dtypes, ``hidden`` and ``weight`` of two dtypes outside autocast, a DTensor that is not
            split over the vocabulary.
        ImportError: on a GPU without Triton, unless ``backend="eager"``.
        NotImplementedError: when differentiated twice.

    Example:
        >>> import torch
        >>> from napo_loss import linear_sequence_logps
        >>> hidden = torch.ones(1, 3, 4, requires_grad=True)
        >>> lm_head = torch.nn.Linear(4, 8, bias=False)
        >>> _ = torch.nn.init.zeros_(lm_head.weight)  # uniform over 8 tokens: −2.0794 nats each
        >>> linear_sequence_logps(hidden, lm_head.weight, torch.tensor([[-100, 5, 1]])).sum.detach()
        tensor([-4.1589])

    Source:
        The factored gradient is the softmax cross-entropy's; the order of work is this library's, see DESIGN.md. What
        it costs: docs/logps.md.
    """
    hidden, weight, bias, columns = local_head(hidden, weight, bias)
    head = Head.of(weight, bias, logit_scale=logit_scale, softcap=softcap)
    packed = cu_seqlens is not None
    check_positions("hidden", hidden, "D", packed)
    check_head(hidden, head.weight, bias, head.lora_A, head.lora_B, shard=columns is not None)
    check_labels(labels, hidden, "hidden")
    if packed:
        check_cu_seqlens(cu_seqlens, labels)
    if token_weights is not None:
        check_like("token_weights", token_weights, "labels", labels, labels.shape)
    numbers = {
        "softcap": softcap, "logit_scale": logit_scale, "logits_budget": logits_budget, "max_active": max_active,
    }  # fmt: skip
    for name, value in numbers.items():
        if value is not None:
            check_positive(name, value)
    check_backend(backend, "hidden", hidden)

    if autocasts(hidden):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    head = head.to(hidden.dtype)  # PEFT, too, keeps adapters in float32 beside a bfloat16 model
    packing = Packing(cu_seqlens, labels.shape[0]) if cu_seqlens is not None else None
    target = targets(labels, shift, ignore_index, packing)
    call = LinearCall.of(
        hidden[None] if packed else hidden, head, target[None] if packed else target, columns=columns,
        ignore_index=ignore_index, budget=int(logits_budget or 0), max_active=math.ceil(max_active or 0),
        token_statistics=token_statistics, backend=backend,
    )  # fmt: skip
    token_logps, statistics, *_ = linear_ops.linear_logps(**call.to_schema())
    logps = per_sequence(token_logps.view(target.shape), target != ignore_index, token_weights, shift, packing)
    if not token_statistics:
        return logps
    entropy, top1, mean = statistics.detach().view(3, *target.shape).unbind()
    return SequenceLogps(logps.sum, logps.length, TokenStatistics(entropy, top1 != 0, mean))
