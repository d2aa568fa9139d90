"""Output projections: which modules they are, and the tensors that :func:`napo_loss.linear_sequence_logps` needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from napo_loss.backend import upcast
from napo_loss.checks import LOGITS_DTYPES, is_dtensor
from napo_loss.types import LowRank


class Projection(NamedTuple):
    """``weight [V, D]``, or one with LoRA factors, and ``bias [V]``."""

    weight: Tensor | LowRank
    bias: Tensor | None

    @property
    def whole(self) -> Tensor:
        return self.weight.weight if isinstance(self.weight, LowRank) else self.weight

    @classmethod
    def of(cls, layer: Any) -> Projection:
        """Of a linear layer, or of what PEFT has put around one.

        Raises ``NotImplementedError`` for what would be computed or trained wrongly.
        """
        if not hasattr(layer, "base_layer"):
            _check_plain(layer, layer.weight)
            return cls(layer.weight, layer.bias)
        base = layer.get_base_layer()
        _check_plain(base, base.weight)
        if layer.disable_adapters or layer.merged or not layer.active_adapters:
            return cls(base.weight, base.bias)
        if _has_trainable_tokens(layer):
            # PEFT leaves the bias out there; the verification tells where that matters.
            return cls(layer.get_merged_weights(layer.active_adapters), None)
        if not _is_plain_lora(layer):
            raise NotImplementedError(
                f"fused_head computes plain LoRA on the output projection, not PEFT's {_kind(layer)}: leave the head "
                "out of target_modules, or use sequence_logps(model(**inputs).logits, labels)"
            )
        return cls._of_lora(layer, base)

    @classmethod
    def _of_lora(cls, layer: Any, base: nn.Linear) -> Projection:
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if not active:
            return cls(base.weight, base.bias)
        for name in active:
            if name in layer.lora_variant:
                raise NotImplementedError(
                    f"fused_head computes plain LoRA on the output projection, not the variant of adapter {name!r} "
                    f"({type(layer.lora_variant[name]).__name__}): leave the head out of target_modules"
                )
            if layer.training and getattr(layer.lora_dropout[name], "p", 0) > 0:
                raise NotImplementedError(
                    f"fused_head cannot drop inputs of LoRA on the head: set lora_dropout of adapter {name!r} to 0, or "
                    "leave the head out of target_modules"
                )
        lora_A = torch.cat([upcast(layer.lora_A[name].weight) for name in active])  # [r, D]
        lora_B = torch.cat([layer.scaling[name] * upcast(layer.lora_B[name].weight) for name in active], 1)  # [V, r]
        bias = base.bias
        for name in active:
            if layer.lora_B[name].bias is not None:  # lora_bias=True
                more = layer.scaling[name] * layer.lora_B[name].bias
                bias = more if bias is None else bias + more
        return cls(LowRank(base.weight, lora_A, lora_B), bias)


def projections(head: nn.Module) -> Iterator[nn.Module]:
    """The linear layers in a model's head, those with adapters around them as one."""
    if isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        yield head
        return
    for child in head.children():
        yield from projections(child)


@contextmanager
def loaded(layer: nn.Module) -> Iterator[None]:
    """With the layer's weights on the device where it runs, should accelerate keep them elsewhere between calls."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


def _check_plain(layer: nn.Module, weight: Tensor) -> None:
    """Quantised weights are integers, float8, or tensors of a class of their own."""
    known = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    if not isinstance(layer, nn.Linear) or not known or weight.dtype not in LOGITS_DTYPES:
        raise NotImplementedError(
            f"fused_head needs the output projection as a linear layer with a float32, bfloat16, float16 or float64 "
            f"weight, got {type(layer).__name__} with a {type(weight).__name__} of {weight.dtype}: keep the head out "
            "of the quantisation"
        )


def _has_trainable_tokens(layer: Any) -> bool:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return isinstance(layer, TrainableTokensLayer)


def _is_plain_lora(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(layer) is Linear and not getattr(layer, "fan_in_fan_out", False)


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__.removeprefix('peft.tuners.').split('.')[0]} ({type(layer).__name__})"
