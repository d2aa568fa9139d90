"""The reference: a model beside the policy, the policy without its adapter, or the policy before its first step."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig

from napo_loss.hf.wrappers import is_encoder_decoder, no_checkpoint_warning

Model = TypeVar("Model", bound=nn.Module)


def refuse_encoder_decoder(model: Any) -> None:
    if is_encoder_decoder(model):
        raise TypeError(
            f"NaPOTrainer trains decoder-only models; {type(model).__name__} is an encoder-decoder, whose labels are "
            "not shifted: call napo_loss on sequence_logps(logits, labels, shift=False) in a loop of your own"
        )


def initial(model: Any, args: DPOConfig, peft_config: Any, *, kept: bool) -> PreTrainedModel | None:
    """The policy as it starts, for TRL to take as the reference; None where it finds a better one itself.

    Args:
        model: the policy, or its name.
        args: the trainer's.
        peft_config: with one the reference is the policy without its adapter.
        kept: the reference's log-probs are kept with the data, so that none is needed once training starts. Then
            the weights are shared, unless something will shard or cast those of the policy.
    """
    if not isinstance(model, PreTrainedModel) or peft_config is not None:
        return None
    unnamed = not model.config._name_or_path
    if kept and not (is_fsdp(args) or args.deepspeed_plugin is not None):
        return twin(model)
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # by ZeRO-3 as it was loaded
    return copy.deepcopy(model) if (kept or unnamed) and not partitioned else None


def is_fsdp(args: DPOConfig) -> bool:
    return args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def twin(model: Model) -> Model:
    """A copy of the modules around the same weights."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Inside, a PEFT model is its own reference: its pretrained adapter as it started, or none. Others stay."""
    with no_checkpoint_warning():
        if not is_peft_model(model):
            yield
        elif "ref" in model.peft_config:  # TRL's copy of a pretrained adapter
            active = model.active_adapter
            model.set_adapter("ref")
            try:
                yield
            finally:
                model.set_adapter(active)
        else:
            with model.disable_adapter():
                yield


def weights_of_reference(model: nn.Module, *, own: bool) -> dict[str, torch.Tensor]:
    """The tensors that decide the reference's log-probs: of a PEFT model that is its own, not those of the adapter."""
    adapter: set[str] = set()
    if own and is_peft_model(model) and "ref" not in model.peft_config:  # pyright: ignore[reportOperatorIssue]
        adapter = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if name not in adapter}
