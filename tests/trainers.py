"""Trainers small enough for a test, of whichever TRL is installed."""

from __future__ import annotations

import copy

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import TrainerCallback

import tiny
from napo_loss import reference
from napo_loss.trl import NaPOConfig, NaPOTrainer

TRL = Version(trl.__version__)
NAMES = ["rejected", "question_only", "image_only"]
QUIET = [
    # transformers warns about names that TRL still uses; pin_memory has nothing to pin to here.
    pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]

COMPARES = pytest.mark.skipif(
    TRL.release[:2] == (1, 15) and not torch.cuda.is_available(), reason="the DPOTrainer of TRL 1.15 fails on a CPU"
)


def arguments(cls, folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "save_strategy": "no", "max_steps": 2, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(str(folder), **{**defaults, **kwargs})


def pairs(rows=range(8)) -> Dataset:
    """No two rows alike, and of several lengths: a rank with another's rows, or another padding, would show."""
    words = tiny.WORDS.split()[4:]

    def text(i, k):
        return "".join(f" {words[(3 * i + 5 * k + j) % len(words)]}" for j in range(1 + (i + 2 * k) % 4))

    return Dataset.from_dict({c: [text(i, k) for i in rows] for k, c in enumerate(["prompt", "chosen", *NAMES])})


def moved(model):
    """A policy that is not its reference: margins differ from 0."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return other


def trainer_for(kind, folder, *, columns=NAMES, trainer=NaPOTrainer, config=NaPOConfig, n=4, **kwargs):
    vision = kind == "vision"
    model, processing = (tiny.llava(), tiny.processor()) if vision else (tiny.llama(), tiny.tokenizer())
    data = tiny.vision_pairs(n) if vision else tiny.text_pairs(n)
    data = data.remove_columns([c for c in NAMES if c not in ["rejected", *columns]])
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "peft_config") if key in kwargs}
    ref = None if "peft_config" in extra or kwargs.get("precompute_ref_log_probs") else model
    policy = moved(model) if ref is not None else model
    return trainer(
        policy, ref, arguments(config, folder, **kwargs), train_dataset=data, processing_class=processing, **extra
    )


def text_trainer(data, folder, trainer=NaPOTrainer, config=NaPOConfig, model=None, ref=None, extra=None, **kwargs):
    return trainer(
        model or moved(tiny.llama()), ref or tiny.llama(), arguments(config, folder, **kwargs), train_dataset=data,
        processing_class=tiny.tokenizer(), **(extra or {}),
    )  # fmt: skip


def logps_by_hand(model, batch):
    """Sequence log-probs from full logits: no fused head, no trainer."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(**{k: v for k, v in batch.items() if k not in ("completion_mask", "reference_logps")}).logits
    return reference.sequence_logps(logits.double(), labels)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorded(NaPOTrainer):
    """Keeps the numbers of every micro-batch as they are: the log has four digits."""

    steps: list[dict[str, float]]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            loss = self.accelerator.reduce(out.detach(), "mean").item()
            kept = {"loss": loss, **{name: values[-1] for name, values in self._metrics["train"].items()}}
            self.steps = [*getattr(self, "steps", []), kept]
        return out


class Gradients(TrainerCallback):
    """The whole gradient before every step of the optimiser; DeepSpeed keeps its gradients elsewhere."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        if found:
            self.steps.append(found)


def whole(x: torch.Tensor) -> torch.Tensor:
    if hasattr(x, "ds_id"):  # a parameter under ZeRO-3
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(x).clone()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
