"""Models and what wraps them."""

from __future__ import annotations

from collections.abc import Iterator
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
    for module in chain(model):
        if hasattr(module, "_orig_mod") or hasattr(module, "get_base_model") or not hasattr(module, "module"):
            return module
    return model
