"""Keeps what the losses of a run found, whatever trainer called them, and writes it down for the runner to judge."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import napo_loss
from napo_loss import NaPOLoss, Negative, Recipe

LOSS = napo_loss.napo_loss
DPO = Recipe(Negative(q=0.0))
DPO2 = Recipe(Negative(q=0.0, weight=0.5))  # for the same negative twice
STEPS = 3


class Watched:
    """``napo_loss`` that keeps q, and the margins of this rank alone; with ``recipe``, whatever the caller says."""

    def __init__(self, recipe: Recipe | None = None):
        self.recipe = recipe
        self.calls: list[dict] = []

    def __call__(self, *logps, **settings):
        settings = settings if self.recipe is None else {**settings, "recipe": self.recipe}
        settings = {name: x for name, x in settings.items() if x is not None}
        out = LOSS(*logps, **settings)
        with torch.no_grad():
            alone = LOSS(*logps, **{**settings, "process_group": None})
        self.calls.append(
            {
                "q": out.q.flatten().tolist(), "own": alone.moments[0].flatten().tolist(),
                "loss": out.losses.mean().item(),
            }
        )  # fmt: skip
        return out


def watch_module(watched: Watched) -> None:
    """Every NaPOLoss of this process, by the same watcher."""

    def forward(self, chosen, rejected, reference_chosen, reference_rejected, moments=None):
        assert moments is None  # of a batch of several micro-batches, which no recipe here has
        logps = chosen, rejected, reference_chosen, reference_rejected
        out = watched(*logps, beta=self.beta, process_group=self.process_group, recipe=self.recipe)
        return out._replace(losses=out.losses.mean()) if self.reduction == "mean" else out

    NaPOLoss.forward = forward


def keeps_losses(cls: type, losses: list[float], moved: list[float] | None = None) -> type:
    """The trainer, whose losses are written down with all their digits, and how far its weights are from the start."""
    before: dict = {}
    compute = cls.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, **further):
        before.update(before or weights(self.accelerator.unwrap_model(model)))
        out = compute(self, model, inputs, return_outputs, **further)
        losses.append((out[0] if return_outputs else out).item())
        if moved is not None:
            moved[:] = [distance(before, self.accelerator.unwrap_model(model))]
        return out

    return type(cls.__name__, (cls,), {"compute_loss": compute_loss})


def distance(before: dict, model: torch.nn.Module) -> float:
    """How far the weights have moved: of one that training replaced or wrapped, by name."""
    after = {name.removeprefix("module."): p.detach().cpu() for name, p in model.named_parameters()}
    return max((after[name] - p).abs().max().item() for name, p in before.items())


def weights(model: torch.nn.Module) -> dict:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def write(name: str, packages: list[str], runs: dict[str, dict]) -> None:
    """``runs``: by what was run, ``{"losses", "calls", "moved"}``, of this rank."""
    found = {}
    for package in ["torch", *packages]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    rank = dist.get_rank() if dist.is_initialized() else 0
    report = {"recipe": name, "versions": found, "runs": runs}
    Path(os.environ["RECIPES_OUT"], f"{name}-{rank}.json").write_text(json.dumps(report))
