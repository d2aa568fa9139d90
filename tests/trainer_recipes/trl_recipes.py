"""TRL: the hook up to 0.28, a subclass and NaPOTrainer from 0.29 on, and two negatives through one rejected column."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from datasets import Dataset
from packaging.version import Version
from trl import DPOConfig, DPOTrainer
from trl import __version__ as TRL

import tiny
from trainer_recipes import data, page, watch

ARGUMENTS = {
    "per_device_train_batch_size": 2, "max_steps": watch.STEPS, "learning_rate": 2.0, "optim": "sgd",
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False, "ddp_backend": "gloo",
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
}  # fmt: skip


def train(trainer: type, config=DPOConfig, dataset=None, **settings) -> dict:
    torch.manual_seed(0)
    losses: list[float] = []
    model = tiny.llama()
    before = watch.weights(model)
    dataset = dataset or Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in data.rows()])
    with tempfile.TemporaryDirectory() as folder:
        made = watch.keeps_losses(trainer, losses)(
            model, tiny.llama(), config(folder, **{**ARGUMENTS, **settings}), train_dataset=dataset,
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        made.train()
    return {"losses": losses, "moved": watch.distance(before, made.model)}


def with_hook(recipe, *blocks: str) -> tuple[type, watch.Watched]:
    found = page.names(*blocks, DPOTrainer=DPOTrainer)
    found["napo_loss"] = watched = watch.Watched(recipe)
    return found["Trainer"], watched


def run(blocks: list[str], theirs: dict) -> dict[str, dict]:
    runs = {"theirs": theirs}
    for name, recipe in (("q0", watch.DPO), ("ours", None)):
        trainer, watched = with_hook(recipe, *blocks)
        runs[name] = {**train(trainer), "calls": watched.calls}
    return runs


def several(blocks: list[str]) -> dict[str, dict]:
    """Two negatives of each prompt in rows that follow each other; one of them twice has the loss of that one."""
    rows = data.rows()
    runs = {}
    for name, columns, recipe in (
        ("q0", ("rejected", "rejected"), watch.DPO2), ("ours", ("rejected", "other"), None),
    ):  # fmt: skip
        dataset = Dataset.from_list(
            [{"prompt": r["prompt"], "chosen": r["chosen"], "rejected": r[c]} for r in rows for c in columns]
        )
        trainer, watched = with_hook(recipe, *blocks)
        settings = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
        runs[name] = {**train(trainer, dataset=dataset, **settings), "calls": watched.calls}
    in_order = page.names(*blocks, DPOTrainer=DPOTrainer)["Trainer"]._get_train_sampler
    runs["theirs"] = train(type("InOrder", (DPOTrainer,), {"_get_train_sampler": in_order}))
    return runs


def napo_trainer() -> dict[str, dict]:
    from napo_loss.trl import NaPOConfig, NaPOTrainer

    runs = {"theirs": train(DPOTrainer)}
    watched = watch.Watched()
    watch.watch_module(watched)
    runs["q0"] = train(NaPOTrainer, partial(NaPOConfig, negatives={"rejected": {"q": 0.0, "weight": 1.0}}))
    watched.calls.clear()
    rows = [{("image_only" if k == "other" else k): text for k, text in row.items()} for row in data.rows()]
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "NaPOConfig": lambda out, **settings: NaPOConfig(folder, **{**ARGUMENTS, **settings}),
            "NaPOTrainer": partial(watch.keeps_losses(NaPOTrainer, losses), ref_model=tiny.llama()),
            "model": tiny.llama(), "dataset": Dataset.from_list(rows), "tokenizer": tiny.tokenizer(),
        }  # fmt: skip
        before = watch.weights(given["model"])
        page.names(page.code("NaPOTrainer"), **given)
    calls = [{"q": c["q"][1:], "own": c["own"][1:], "alpha": 0.05} for c in watched.calls]  # the first has a fixed q
    runs["ours"] = {"losses": losses, "calls": calls, "moved": watch.distance(before, given["model"])}
    return runs


def main() -> None:
    packages = ["trl", "transformers", "accelerate"]
    hook = page.code("The hook")
    if Version(TRL) < Version("0.29"):
        theirs = train(DPOTrainer)
        watch.write("TRL, the hook", packages, run([hook, page.code("TRL 0.20 to 0.28")], theirs))
        watch.write("TRL, two negatives", packages, several([page.code("Several negatives, one rejected column")]))
    else:
        watch.write("TRL, a subclass", packages, run([page.code("A subclass for TRL")], train(DPOTrainer)))
        watch.write("TRL, NaPOTrainer", packages, napo_trainer())


if __name__ == "__main__":
    main()
