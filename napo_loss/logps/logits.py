"""Sequence log-probs from logits: check, shift, dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from napo_loss.checks import (
    check_backend,
    check_cu_seqlens,
    check_labels,
    check_like,
    check_logits,
    check_writable,
)
from napo_loss.logps import ops, sharded
from napo_loss.logps.calls import LogitsCall, ShardedCall
from napo_loss.logps.tokens import Packing, per_sequence, targets
from napo_loss.parallel.shards import local_logits
from napo_loss.types import SequenceLogps, VocabShard


def sequence_logps(
    logits: Tensor | VocabShard,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    backend: Literal["auto", "triton", "eager"] = "auto",
) -> SequenceLogps:
    r"""Log-probability of each sequence's active tokens, fused forward and backward.

    ``sum_n = Σ_t w_nt·(x_nt[y_nt] − logsumexp(x_nt))`` over positions whose label is not ``ignore_index``,
    and ``dsum_n/dx_nt = w_nt·(onehot(y_nt) − softmax(x_nt))``. Masked positions are not read: their logits may
    hold anything, NaN included, and their gradient is exactly 0.

    Args:
        logits: ``[N, T, V]``, float32, bfloat16, float16 (computed in float32) or float64; any strides. Where the
            vocabulary is split over ranks: a DTensor with ``Shard(-1)``, or a :class:`napo_loss.VocabShard` of this
            rank's columns.
        labels: ``[N, T]``, int64 or int32, the Hugging Face convention: unshifted, ``ignore_index`` where a
            token does not count. Position t of the logits predicts label t + 1.
        token_weights: ``[N, T]``, aligned with ``labels``; weighs each token's log-prob. Not differentiated.
        shift: ``False`` where position t of the logits predicts label t already.
        ignore_index: the label that does not count.
        cu_seqlens: ``[N + 1]``, int32 or int64, rising from 0 to total: sequences are packed, without padding, into
            ``logits [total, V]``, ``labels [total]`` and ``token_weights [total]``. No sequence predicts the first
            token of the next. Wrong offsets are an error on a CPU and NaN on a GPU.
        inplace_backward: write the gradient over the logits. Only when nothing else reads them, the last layer's
            backward included. Ignored under ``torch.compile``.
        backend: ``"auto"``: Triton kernels on a GPU, plain tensor operations in row chunks elsewhere (and for
            float64); or one of them by name.

    Returns:
        :class:`SequenceLogps`: ``sum [N]`` in nats and ``length [N]``, float32 (float64 for float64 logits),
        ``.mean``, and ``.pairs(K)`` to split ``[chosen; negatives]``. A fully masked sequence has sum 0,
        length 0 and mean 0.

    Raises:
        ValueError: on mismatched shapes or devices, an empty batch, a label outside the vocabulary (on a GPU,
            where looking would cost a sync: NaN in that sequence's sum).
        TypeError: on dtypes other than the ones above, and on float64 with ``backend="triton"``.
        ImportError: on a GPU without Triton, unless ``backend="eager"``.
        NotImplementedError: when differentiated twice, or in forward mode.

    Example:
        >>> import torch
        >>> from napo_loss import sequence_logps
        >>> logits = torch.zeros(2, 4, 8, requires_grad=True)  # uniform over 8 tokens: −2.0794 nats each
        >>> labels = torch.tensor([[-100, -100, 5, 1], [-100, 3, 7, 2]])
        >>> logps = sequence_logps(logits, labels)
        >>> logps.sum.detach()
        tensor([-4.1589, -6.2383])
        >>> logps.length
        tensor([2., 3.])

    Source:
        The factored gradient is the softmax cross-entropy's; the convention is transformers'. What it costs:
        docs/logps.md.
    """
    packed = cu_seqlens is not None
    logits, columns = local_logits(logits)
    check_logits(logits, packed)
    check_labels(labels, logits)
    if packed:
        check_cu_seqlens(cu_seqlens, labels)
    if inplace_backward:
        check_writable(logits)
    if token_weights is not None:
        check_like("token_weights", token_weights, "labels", labels, labels.shape)
        token_weights = token_weights.detach()
    check_backend(backend, "logits", logits)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if not packed and columns is None:
        call = LogitsCall(logits, labels, token_weights, int(shift), ignore_index, inplace, backend)
        sums, lengths, _ = ops.sequence_logps(**call.to_schema())
        return SequenceLogps(sums, lengths.detach())
    packing = Packing(cu_seqlens, labels.shape[0]) if cu_seqlens is not None else None
    target = targets(labels, shift, ignore_index, packing)
    # Each packed position is a sequence of its own to the kernels; adding up `total` floats is cheap.
    x, y = (logits[:, None], target[:, None]) if packed else (logits, target)  # [total, 1, V] and [total, 1]
    if columns is None:
        call = LogitsCall.of_targets(x, y, ignore_index=ignore_index, inplace_backward=inplace, backend=backend)
        logps, _, _ = ops.sequence_logps(**call.to_schema())
    else:
        call = ShardedCall(x, y, columns, ignore_index, inplace, backend)
        logps, _, _ = sharded.sharded_logps(**call.to_schema())
    return per_sequence(logps.view(target.shape), target != ignore_index, token_weights, shift, packing)
