"""Batches, and a step, for those who write their own loop: Lightning, accelerate, torchtune's classes."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import tiny
from napo_loss import reference
from trainer_recipes import data, watch


def encoded(rejected: str = "rejected") -> list[dict[str, torch.Tensor]]:
    """Two pairs a batch, other ones on each rank: chosen, then rejected, with labels."""
    tokenizer, rank = tiny.tokenizer(), dist.get_rank()
    rows = data.rows()[8 * rank : 8 * rank + 2 * watch.STEPS]
    batches = []
    for i in range(0, len(rows), 2):
        ids, labels = [], []
        for column in ("chosen", rejected):
            for row in rows[i : i + 2]:
                prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", column))
                ids.append(torch.tensor(prompt + answer))
                labels.append(torch.tensor([-100] * len(prompt) + answer))
        batch = {"input_ids": pad_sequence(ids, batch_first=True), "labels": pad_sequence(labels, True, -100)}
        batches.append({**batch, "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], True)})
    return batches


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny.llama()
    return model, copy.deepcopy(model).requires_grad_(False)


def plain_dpo(beta: float = 0.1) -> list[float]:
    """Sigmoid DPO by the formula, in these loops that have no loss of their own: on two ranks, by hand."""
    model, other = models()
    losses = []
    for batch in encoded():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        chosen, rejected = reference.sequence_logps(model(**inputs).logits, batch["labels"]).pairs()
        ref_chosen, ref_rejected = reference.sequence_logps(other(**inputs).logits, batch["labels"]).pairs()
        psi = (chosen.sum - rejected.sum) - (ref_chosen.sum - ref_rejected.sum)
        loss = -torch.nn.functional.logsigmoid(beta * psi).mean()
        losses.append(loss.item())
        step(model, loss)
    return losses


def step(model: torch.nn.Module, loss: torch.Tensor, learning_rate: float = 2.0) -> None:
    """SGD on the mean of the ranks' gradients, as DDP has it."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p -= learning_rate * p.grad / dist.get_world_size()
