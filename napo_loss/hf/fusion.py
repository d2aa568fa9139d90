"""The hooks of ``fused_head``: what they take from a call of the model, compute beside it, and put in its place."""
# torch.compiler.disable is typed for functions, not for methods:
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from napo_loss.checks import is_dtensor
from napo_loss.hf.call import FusedCall, Join, Take
from napo_loss.hf.processing import Processing, check, ramp, solve
from napo_loss.hf.projection import Projection, loaded, projections
from napo_loss.hf.wrappers import caller, is_encoder_decoder, no_checkpoint_warning, unwrap
from napo_loss.logps.linear import linear_sequence_logps
from napo_loss.parallel.shards import as_replicated
from napo_loss.types import LowRank, SequenceLogps

_PROCESSING: WeakKeyDictionary[nn.Module, Processing] = WeakKeyDictionary()
"""What each model does to its logits, once it has been read off."""
_VERIFIED: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()
"""Output projections, with their adapters, hooks and dtypes, of which log-probs were compared with the model's."""


class Fusion:
    """The hooks of one ``fused_head``.

    They act on the module that they are called with, so a deep copy of the model runs on its own weights. A copy of
    the model made inside keeps them after the end, when they do nothing; so does one that was pickled.
    """

    def __init__(self, model: nn.Module, token_statistics: bool = False, logits_budget: int | None = None):
        self.active = True
        self.token_statistics = token_statistics
        self.logits_budget = logits_budget
        self.calls = threading.local()
        self.handles: list[Any] = []
        self.caller, self.inner = caller(model), unwrap(model)
        self.name = type(self.inner).__name__
        head = self.inner.get_output_embeddings() if hasattr(self.inner, "get_output_embeddings") else None
        self.layers = [] if head is None else list(projections(head))
        if not self.layers:
            raise TypeError(
                f"fused_head needs a transformers model whose output embeddings are a linear layer, got "
                f"{self.name} with {type(head).__name__}"
            )
        if is_encoder_decoder(self.inner):
            raise NotImplementedError(
                f"fused_head is for causal models, and {self.name} is an encoder-decoder, whose labels are not "
                "shifted: use sequence_logps(model(**inputs).logits, labels, shift=False)"
            )

    def __deepcopy__(self, memo: dict) -> Fusion:
        return self

    def __reduce__(self):
        return _inert, ()

    def register(self) -> None:
        """Before everybody else's where a shard must still be whole, and after where they prepare or cast."""
        keep = self.handles.append  # one by one: an interrupt in between must not leave any
        keep(self.caller.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True))
        keep(self.caller.register_forward_hook(self.leave, always_call=True))
        for layer in self.layers:
            keep(layer.register_forward_pre_hook(self.shrink))
            keep(layer.register_forward_hook(self.compute, prepend=True))

    @property
    def call(self) -> FusedCall | None:
        """The call that this thread is in."""
        return getattr(self.calls, "now", None) if self.active else None

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Takes from the call what is not the model's, its labels above all: it would compute a loss of all logits."""
        if not self.active or (self.call is not None and self.call.probes):
            return None
        self.calls.now = None
        if kwargs.get("labels") is None:
            return None
        given = dict(kwargs)
        call = FusedCall(given.pop("labels"), given.pop("token_weights", None), given.get("cu_seq_lens_q"))
        for unused in ("logits_to_keep", "num_items_in_batch", "return_dict"):
            given.pop(unused, None)
        if _takes_use_cache(type(self.inner)):
            given["use_cache"] = False
        if self.inner not in _PROCESSING:
            self._read_off(module, args, given, call)
        self.calls.now = call
        return args, given

    def _read_off(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], call: FusedCall) -> None:
        """Runs the model with a ramp for its logits; of a compiled model, what was compiled."""
        probe = self.calls.now = replace(call, probes=True)
        devices = {p.device for p in self.inner.parameters() if p.device.type == "cuda"}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), no_checkpoint_warning():
                output = getattr(module, "_orig_mod", module)(*args, **kwargs)
        finally:
            self.calls.now = None
        self._check_called(probe)
        assert probe.shown is not None
        _PROCESSING[self.inner] = solve(probe.shown, _logits(output, self.name), self.inner.config, self.name)

    @torch.compiler.disable
    def shrink(self, layer: nn.Module, args: tuple):
        """Keeps the hidden states, and lets the layer see one position of each sequence."""
        call = self.call
        if call is None:
            return None
        if call.hidden is not None:
            raise NotImplementedError(f"{self.name} calls its output projection more than once in a forward")
        call.keep(args[0], self.name, self._virtual_tokens())
        return (call.one_position(), *args[1:])

    def _virtual_tokens(self) -> int:
        """How many PEFT's prompt learning may have put in front."""
        config = getattr(self.caller, "active_peft_config", None)
        return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0

    @torch.compiler.disable
    def compute(self, layer: nn.Module, args: tuple, output: Tensor):
        """The log-probs, while the layer's weight is here. They ride behind the layer's own output, so that whoever
        shards the layer has it back when their gradient comes."""
        call = self.call
        if call is None:
            return None
        if call.probes:
            shown = call.shown = ramp(output.shape[-1], output)
            return shown.expand(output.shape).clone()  # some write into their logits, and shown must stay as it was
        processing = _PROCESSING[self.inner]
        with loaded(layer):
            projection = Projection.of(layer)
            head = {"bias": projection.bias, **processing._asdict()}
            call.logps = self._logps(call, projection, head)
            key = self._key(layer, projection, output)
            if key not in _VERIFIED.setdefault(self.inner, set()):
                call.verify(key, output, lambda h, y: self._linear(h, y, projection, head, shift=False))
        if not call.logps.sum.requires_grad:
            return None
        return Join.apply(output.detach(), call.logps.sum, call.box)

    def _logps(self, call: FusedCall, projection: Projection, head: dict[str, Any]) -> SequenceLogps:
        options = {"token_statistics": self.token_statistics, "logits_budget": self.logits_budget}
        hidden, labels, tokens = call.flat(projection.whole.device)
        return call.unpadded(self._linear(hidden, labels, projection, head, **tokens, **options))

    def _linear(self, hidden: Tensor, labels: Tensor, projection: Projection, head: dict[str, Any], **options):
        whole = projection.whole
        hidden = hidden.to(whole.device)  # a model spread over devices may keep its head on another
        if is_dtensor(whole):  # FSDP2 has gathered by now, so it is tensor parallelism, under which hidden is whole
            hidden = as_replicated(hidden, whole)
        return linear_sequence_logps(hidden, projection.weight, labels.to(whole.device), **head, **options)

    def _key(self, layer: nn.Module, projection: Projection, output: Tensor) -> tuple:
        """What may change what the model's logits are beside the numbers in its weights."""
        hooks = len(layer._forward_hooks), len(self.inner._forward_hooks), len(self.caller._forward_hooks)
        low_rank, biased = isinstance(projection.weight, LowRank), projection.bias is not None
        return id(layer), hooks, low_rank, biased, output.dtype, projection.whole.dtype

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: tuple, output: Any):
        """Puts the log-probs in the place of the model's output, whose one position verifies them."""
        call = self.call
        if call is None or call.probes:
            return None
        self.calls.now = None
        if output is None:  # an error is on its way
            return None
        self._check_called(call)
        logits = _logits(output, self.name)
        assert call.logps is not None
        if call.verification is not None:
            columns, ours, dtype, key = call.verification
            if check(ours, logits[:, -1], columns, dtype, self.name):
                _VERIFIED[self.inner].add(key)
        aux_loss = getattr(output, "aux_loss", None)
        total = call.logps.sum
        if total.requires_grad:
            total = Take.apply(logits, total, call.box)
        return call.logps._replace(sum=total, aux_loss=aux_loss)

    def _check_called(self, call: FusedCall) -> None:
        if call.hidden is not None:
            return
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (self.caller, self.inner)):
            raise RuntimeError(
                f"fused_head was not seen by the compiled code of {self.name}, which had been called before: enter "
                "fused_head before the first call, or call torch.compiler.reset()"
            )
        raise NotImplementedError(f"fused_head: {self.name} does not call its output projection in its forward")


def _logits(output: Any, name: str) -> Tensor:
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise NotImplementedError(f"fused_head: {name} returns no logits, but a {type(output).__name__}")
    return logits


@lru_cache
def _takes_use_cache(model: type) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def _inert() -> Fusion:
    fusion = Fusion.__new__(Fusion)
    fusion.active = False
    return fusion
