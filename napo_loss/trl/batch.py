"""The batch of an optimiser step that a micro-batch is a part of, where q is read from all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from napo_loss.objective.estimators import BatchMoments

KEY = "napo_batch"
"""Under which a micro-batch carries it past what walks over the inputs of a step."""


@dataclass(frozen=True)
class Whole:
    """
    Attributes:
        scale: factor of a micro-batch's sum of losses, with which the mean over micro-batches and ranks, as the
            trainer and what wraps its model take it, is the mean over all pairs. None: its losses are averaged.
        moments: what q and weights are read from; None where the batch is this micro-batch on every rank.
        reference: log-probs ``[N]`` of the micro-batch's rows, which were needed for the moments.
    """

    scale: Tensor | None = None
    moments: BatchMoments | None = None
    reference: Tensor | None = None


def read(trainer: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches that carry what is read from all of them: one more pass of the policy, without gradients.

    A batch that is one micro-batch (on each rank) needs no such pass: the loss reads it itself.
    """
    K = len(trainer.negatives)
    pairs = [len(inputs["input_ids"]) // (1 + K) for inputs in samples]
    device, ranks = trainer.accelerator.device, trainer.accelerator.num_processes
    total = trainer.accelerator.reduce(torch.tensor(float(sum(pairs)), device=device), "sum")
    scale = len(samples) * ranks / total
    if len(samples) == 1:
        return [{**samples[0], KEY: Whole(scale)}]
    model = trainer.model_wrapped
    model.train()  # as in the step to come, which an evaluation may precede
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()
    policies, references = [], []
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # dropout is drawn again as it was
        for inputs in map(trainer._prepare_inputs, samples):
            references.append(trainer.reference_of(inputs))
            policies.append(trainer.sequence_logps(model, inputs))
    parts = [trainer.split(x) for x in policies]
    chosen = _joined([chosen for chosen, _ in parts])
    rejected = _joined([rejected for _, rejected in parts])
    reference = torch.cat([x.view(1 + K, -1) for x in references], 1)
    trainer.napo.train()
    moments = trainer.napo.batch_moments(chosen, rejected, reference[0], reference[1:])
    return [
        {**inputs, KEY: Whole(scale, moments, reference)} for inputs, reference in zip(samples, references, strict=True)
    ]


def _joined(parts: list[Any]) -> Any:
    """Sequences of all micro-batches, in the last dimension."""
    return type(parts[0])(torch.cat([x.sum for x in parts], -1), torch.cat([x.length for x in parts], -1))
