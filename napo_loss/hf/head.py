"""``fused_head``: a Hugging Face model that returns sequence log-probs in place of logits, inside its own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from napo_loss.checks import is_dtensor
from napo_loss.logps.linear import linear_sequence_logps
from napo_loss.parallel.shards import as_replicated
from napo_loss.types import LowRank

Model = TypeVar("Model", bound=nn.Module)
WRAPPERS = ("_orig_mod", "module", "get_base_model")
"""What torch.compile, DDP and DeepSpeed, and PEFT call the model that they wrap."""


@contextmanager
def fused_head(model: Model, *, logits_budget: int | None = None) -> Iterator[Model]:
    """Inside, ``model(**inputs, labels=labels)`` returns :class:`SequenceLogps`, never forming the logits.

    Backbone and lm_head run as modules of the model's own forward pass: what sharding, hooks, PEFT and gradient
    checkpointing rely on (docs/logps.md). Bias, softcap and logit scale are the model's own, read from its config; the
    loss that the model would have computed is not. Calls without ``labels``, generation too, are unchanged.

    Args:
        model: a causal language model or vision-language model of transformers, wrapped or not. Enter before the call
            and leave after it; backward may run later. Wrapped by DDP or compiled: keep one context around the run.
        logits_budget: as in :func:`napo_loss.linear_sequence_logps`.

    Yields:
        ``model``, whose forward takes, beside its own arguments, ``labels [N, T]`` (unshifted, -100 where a token does
        not count) and ``token_weights``. Packed sequences (``[1, total]``) are told apart by ``cu_seq_lens_q``, which
        transformers' collators make for flash attention.

    Raises:
        TypeError: for a model without output embeddings, or with ones that are not a linear layer.
        NotImplementedError: for LoRA on the head with dropout in training, or a variant such as DoRA.

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
        transformers' ``base_model`` and ``get_output_embeddings``. A model that does something else to its logits than
        scale, softcap and bias is not recognised: compare once with ``sequence_logps(model(**inputs).logits, labels)``.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    layers = [] if head is None else [m for m in head.modules() if _is_projection(m)]
    if not layers:
        raise TypeError(
            f"fused_head needs a transformers model whose output embeddings are a linear layer, got "
            f"{type(inner).__name__} with {type(head).__name__}"
        )
    softcap, logit_scale = _logit_processing(inner)
    own_forward = inner.forward

    def forward(*args, labels: Tensor | None = None, token_weights: Tensor | None = None, **kwargs):
        if labels is None:
            return own_forward(*args, **kwargs)
        for unused in ("logits_to_keep", "num_items_in_batch", "return_dict", "use_cache"):
            kwargs.pop(unused, None)
        hidden = inner.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        # Called as a module, so that whoever shards the head gathers it; its forward is `projection` below.
        tokens = {"labels": labels, "token_weights": token_weights, "cu_seqlens": kwargs.get("cu_seq_lens_q")}
        return inner.get_output_embeddings()(hidden, tokens=tokens)

    def projection(layer: nn.Module, original):
        def project(hidden: Tensor, *args, tokens: dict[str, Any] | None = None, **kwargs):
            if tokens is None:
                return original(hidden, *args, **kwargs)
            weight, bias = _weights(layer)
            at = weight.weight if isinstance(weight, LowRank) else weight
            tokens = {name: None if x is None else x.to(at.device) for name, x in tokens.items()}
            hidden = hidden.to(at.device)  # a model spread over devices may keep its head on another
            if is_dtensor(at):  # FSDP2 has gathered by now, so it is tensor parallelism, under which hidden is whole
                hidden = as_replicated(hidden, at)
            if tokens["cu_seqlens"] is not None:
                hidden = hidden.flatten(0, 1)
                tokens |= {name: x.flatten() for name, x in tokens.items() if x is not None}
            return linear_sequence_logps(
                hidden, weight, tokens.pop("labels"), bias=bias, softcap=softcap, logit_scale=logit_scale,
                logits_budget=logits_budget, **tokens,
            )  # fmt: skip

        return project

    forwards = {inner: forward, **{layer: projection(layer, layer.forward) for layer in layers}}
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, function in forwards.items():
        module.__dict__["forward"] = function
    try:
        yield model
    finally:
        for module, function in before.items():
            if function is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = function


def unwrap(model: nn.Module) -> Any:
    while True:
        for name in WRAPPERS:
            if hasattr(model, name):
                inner = getattr(model, name)
                model = inner() if name == "get_base_model" else inner
                break
        else:
            return model


def _is_projection(module: nn.Module) -> bool:
    """A linear layer, or PEFT's LoRA around one (whose own parts are not called then)."""
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _weights(layer: Any) -> tuple[Tensor | LowRank, Tensor | None]:
    """Weight and bias of a linear layer; with the LoRA factors of its active adapters, if any."""
    if not hasattr(layer, "base_layer"):
        return layer.weight, layer.bias
    base = layer.get_base_layer()
    active = [] if layer.disable_adapters or layer.merged else [a for a in layer.active_adapters if a in layer.lora_A]
    if not active:
        return base.weight, base.bias
    for name in active:
        if name in layer.lora_variant:
            raise NotImplementedError(
                f"fused_head computes plain LoRA, not the variant of adapter {name!r} on the head"
            )
        if layer.training and getattr(layer.lora_dropout[name], "p", 0) > 0:
            raise NotImplementedError(
                f"fused_head cannot drop inputs of LoRA on the head: set lora_dropout of adapter {name!r} to 0, or "
                "leave the head out of target_modules"
            )
    lora_A = torch.cat([layer.lora_A[name].weight for name in active])  # [r, D]
    lora_B = torch.cat([layer.scaling[name] * layer.lora_B[name].weight for name in active], dim=1)  # [V, r]
    return LowRank(base.weight, lora_A, lora_B), base.bias


def _logit_processing(model: Any) -> tuple[float | None, float | None]:
    """Softcap and logit scale, under the names that the models of transformers have for them."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            return softcap, getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return softcap, None
    return softcap, scaling if config.model_type.startswith("hyperclovax") else 1 / scaling  # Granite divides
