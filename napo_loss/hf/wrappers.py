"""Models, what wraps them, and what is asked of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

WRAPPERS = ("_orig_mod", "module", "get_base_model")
"""What torch.compile, DDP and DeepSpeed, and PEFT call the model that they wrap."""


def unwrap(model: nn.Module) -> Any:
    """The model inside its wrappers."""
    for module in chain(model):
        model = module
    return model


def chain(model: nn.Module) -> Iterator[Any]:
    """The model, what it wraps, what that wraps, …"""
    found: Any = model
    while found is not None:
        yield found
        for name in WRAPPERS:
            if hasattr(found, name):
                inner = getattr(found, name)
                found = inner() if name == "get_base_model" else inner
                break
        else:
            found = None


def caller(model: nn.Module) -> Any:
    """The outermost whose call is the model's: compiled code may not see hooks further in, and PEFT passes them by."""
    return next(
        module
        for module in chain(model)
        if hasattr(module, "_orig_mod") or hasattr(module, "get_base_model") or not hasattr(module, "module")
    )


def is_encoder_decoder(model: Any) -> bool:
    """Whether labels are not shifted: of the model, or of the language model inside it."""
    config = getattr(model, "config", None)
    return any(getattr(c, "is_encoder_decoder", False) for c in (config, getattr(config, "text_config", None)))


@contextmanager
def no_checkpoint_warning() -> Iterator[None]:
    """Reentrant checkpointing warns where nothing asks for a gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield
