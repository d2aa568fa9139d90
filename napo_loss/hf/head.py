"""``fused_head``: a Hugging Face model that returns sequence log-probs in place of logits, from its own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def fused_head(model: Model, *, token_statistics: bool = False, logits_budget: int | None = None) -> Iterator[Model]:
    """Inside, ``model(**inputs, labels=labels)`` returns :class:`SequenceLogps`, never forming the logits.

    The model runs its own forward; only its output projection is given one position of each sequence in place of all,
    and the log-probs are computed beside it, from the hidden states that it was called with. What the model does to
    its logits (scale, softcap) is read off in one more forward pass, without gradients, at the first call for this
    model. Then that one position of each sequence, a real one, is compared: a model whose logits are not reproduced is
    an error and not another number. The loss that the model would have computed is not. Calls without ``labels``,
    generation too, are unchanged.

    Args:
        model: a causal language model or vision-language model of transformers, wrapped or not. Enter before the call
            and leave after it; backward may run later.
        token_statistics: fill ``tokens`` of the result with entropy, top-1 hit and mean logit of each position.
        logits_budget: as in :func:`napo_loss.linear_sequence_logps`.

    Yields:
        ``model``, whose forward takes, beside its own arguments, ``labels [N, T]`` (unshifted, -100 where a token does
        not count) and ``token_weights``. Packed sequences (``[1, total]``) are told apart by ``cu_seq_lens_q``, which
        transformers' collators make for flash attention. ``aux_loss`` of the result is the model's own, of a mixture of
        experts.

    Raises:
        TypeError: for a model without output embeddings, or with ones that hold no linear layer.
        NotImplementedError: for what would be wrong, by name: encoder-decoders, logits that are masked or otherwise
            changed, quantised heads, adapters on the head other than LoRA and trainable tokens, or with dropout.
        RuntimeError: for a model that was compiled and called before.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from napo_loss import fused_head
        >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> with fused_head(model):
        ...     logps = model(input_ids=ids, labels=ids)
        >>> logps.sum.shape, logps.length
        (torch.Size([2]), tensor([2., 2.]))

    Source:
        transformers' ``get_output_embeddings``, PyTorch's module hooks. Which models were tried: docs/models.md.
    """
    from napo_loss.hf.fusion import Fusion  # torch.compiler.disable, at its import, loads the compiler

    fusion = Fusion(model, token_statistics, logits_budget)
    try:
        fusion.register()
        yield model
    finally:
        fusion.active = False
        for handle in fusion.handles:
            handle.remove()
