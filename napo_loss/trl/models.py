"""What ``NaPOTrainer`` does about its models where they are sharded or have no name, and TRL 1.16 does not."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from napo_loss.hf.wrappers import unwrap
from napo_loss.trl.config import NaPOConfig


def needs_copy(model, args: NaPOConfig, peft_config) -> bool:
    """Whether TRL would look for the reference under a name that the model does not have.

    TRL precomputes with the policy itself, but under FSDP, where that is sharded only later, with a reference.
    """
    unnamed = isinstance(model, PreTrainedModel) and not model.config._name_or_path
    fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return unnamed and peft_config is None and (fsdp or not args.precompute_ref_log_probs)


@contextmanager
def gathered_head(model):
    """TRL's fused head, run inside, finds its weight whole where FSDP2 shards the head as a unit of its own.

    TRL reads the weight without calling the head, so nothing gathers it. Of a shard it takes ``full_tensor()``, whose
    backward believes that all ranks have the same gradient: each would train its rows on its own batch alone.
    accelerate 1.15 makes such units of the heads of vision-language models, whose final norm it does not find; those of
    text models it shards with that norm, which is called.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        yield
        return
    gathered = False

    def gather(*_):
        nonlocal gathered
        if isinstance(getattr(head, "weight", None), DTensor):
            head.unshard()
            gathered = True

    hook = inner.base_model.register_forward_hook(gather)  # within the root's forward, which sets FSDP2 up
    try:
        yield
    finally:
        hook.remove()
        if gathered and not torch.is_grad_enabled():  # otherwise the end of backward shards it
            head.reshard()
