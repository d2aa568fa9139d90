"""ms-swift: its own trainer, then with the page's plugin file, by the arguments of its command line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import napo_loss
from trainer_recipes import data, page, watch

ARGUMENTS = {
    "rlhf_type": "dpo", "model_type": "llama", "template": "dummy", "per_device_train_batch_size": 2,
    "max_steps": watch.STEPS, "learning_rate": 2.0, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1,
    "report_to": "none", "use_cpu": "true", "save_strategy": "no", "ddp_backend": "gloo", "max_grad_norm": 0.0,
    "torch_dtype": "float32", "gradient_checkpointing": "false", "dataloader_num_workers": 0, "dataset_num_proc": 1,
    "split_dataset_ratio": 0, "gradient_accumulation_steps": 1, "tuner_type": "full", "max_length": 64,
    "dataloader_pin_memory": "false",
    "bf16": "false", "fp16": "false", "attn_impl": "eager", "seed": 0,
}  # fmt: skip


def train(folder: Path, hook: str | None = None, recipe=None, dataset: str = "pairs", **further) -> dict:
    from swift.pipelines import rlhf_main
    from swift.rlhf_trainers import DPOTrainer
    from swift.trainers import TrainerFactory

    TrainerFactory.TRAINER_MAPPING["dpo"] = "swift.rlhf_trainers.DPOTrainer"
    losses: list[float] = []
    watched, moved = watch.Watched(recipe), []
    own = DPOTrainer.compute_loss
    DPOTrainer.compute_loss = watch.keeps_losses(DPOTrainer, losses, moved).compute_loss
    settings = {
        **ARGUMENTS,
        "model": folder / "model",
        "dataset": folder / f"{dataset}.jsonl",
        "output_dir": folder / "out",
    }
    settings = {name: x for name, x in {**settings, **further}.items() if x is not None}
    arguments = [word for name, x in settings.items() for word in (f"--{name}", str(x))]
    if hook is not None:
        plugin = Path(tempfile.mkdtemp(dir=folder), "plugin.py")  # of each path it imports one
        plugin.write_text(f"{hook}\n{page.code('ms-swift')}\n")
        arguments += ["--external_plugins", str(plugin)]
        sys.modules.pop("plugin", None)
        napo_loss.napo_loss = watched  # which the plugin imports
    torch.manual_seed(0)
    rlhf_main(arguments)
    DPOTrainer.compute_loss, napo_loss.napo_loss = own, watch.LOSS
    return {"losses": losses, "calls": watched.calls, "moved": moved[0]}


def said(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]


def prepare(folder: Path) -> None:
    data.saved(folder)
    for name, columns in {"pairs": ("rejected",), "twice": ("rejected",) * 2, "both": ("rejected", "other")}.items():
        lines = [json.dumps({"messages": said(r), "rejected_response": r[c]}) for r in data.rows() for c in columns]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        os.chdir(folder)
        hook = page.code("The hook")
        runs = {"theirs": train(folder), "q0": train(folder, hook, watch.DPO), "ours": train(folder, hook)}
        watch.write("ms-swift", ["ms-swift", "trl", "transformers"], runs)
        os.chdir("/")
        shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
