"""LLaMA-Factory, from a file of settings: its own trainer, then with the launcher's hook."""

from __future__ import annotations

import importlib.machinery
import sys
import tempfile
import types
from pathlib import Path

import torch

if "torchaudio" not in sys.modules:  # there is none for torch without CUDA; imported for audio, of which we have none
    sys.modules["torchaudio"] = absent = types.ModuleType("torchaudio")
    absent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.tuner import run_exp

from trainer_recipes import data, page, watch

OWN = {name: getattr(CustomDPOTrainer, name) for name in ("dpo_loss", "compute_loss")}


def settings(folder: Path, dataset: str, **further) -> dict:
    return {
        "stage": "dpo", "do_train": True, "model_name_or_path": str(folder / "model"), "finetuning_type": "full",
        "dataset": dataset, "dataset_dir": str(folder), "template": "empty", "cutoff_len": 64, "pref_loss": "sigmoid",
        "overwrite_cache": True, "per_device_train_batch_size": 2,
        "max_steps": watch.STEPS, "learning_rate": 2.0, "optim": "sgd", "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "ddp_backend": "gloo",
        "max_grad_norm": 0.0, "dataloader_pin_memory": False, "disable_gradient_checkpointing": True,
        "preprocessing_num_workers": 1, "disable_tqdm": True, "dataloader_drop_last": True, **further,
    }  # fmt: skip


def prepare(folder: Path) -> None:
    data.saved(folder)
    info = {}
    for name, columns in {"pairs": ("rejected",), "twice": ("rejected",) * 2, "both": ("rejected", "other")}.items():
        rows = [
            {"instruction": r["prompt"], "input": "", "chosen": r["chosen"], "rejected": r[c]}
            for r in data.rows() for c in columns
        ]  # fmt: skip
        data.write_json(folder / f"{name}.json", rows)
        columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
        info[name] = {"file_name": f"{name}.json", "ranking": True, "columns": columns}
    data.write_json(folder / "dataset_info.json", info)


def train(arguments: dict, hook: str | None = None, recipe=None) -> dict:
    losses: list[float] = []
    watched, moved = watch.Watched(recipe), []
    for name, method in OWN.items():
        setattr(CustomDPOTrainer, name, method)
    CustomDPOTrainer.compute_loss = watch.keeps_losses(CustomDPOTrainer, losses, moved).compute_loss
    torch.manual_seed(0)
    arguments = {**arguments, "output_dir": tempfile.mkdtemp(dir=arguments["dataset_dir"])}
    if hook is None:
        run_exp(arguments)
    else:
        launcher = page.code("LLaMA-Factory").replace("run_exp()", "run_exp(arguments)")
        found = page.names(hook, DPOTrainer=CustomDPOTrainer)
        found["napo_loss"] = watched
        page.names(launcher, dpo_loss=found["dpo_loss"], arguments=arguments)
    return {"losses": losses, "calls": watched.calls, "moved": moved[0]}


def main() -> None:
    torch.distributed.destroy_process_group = lambda *_: None  # after each training, of which there are six here
    packages = ["llamafactory", "trl", "transformers"]
    with tempfile.TemporaryDirectory() as name:
        prepare(folder := Path(name))
        hook, pairs = page.code("The hook"), settings(folder, "pairs")
        runs = {"theirs": train(pairs), "q0": train(pairs, hook, watch.DPO), "ours": train(pairs, hook)}
        watch.write("LLaMA-Factory", packages, runs)
        in_order = {"disable_shuffling": True}
        few, four = settings(folder, "pairs", **in_order), {**in_order, "per_device_train_batch_size": 4}
        several = page.code("Several negatives, one rejected column")
        runs = {
            "theirs": train(few),
            "q0": train(settings(folder, "twice", **four), several, watch.DPO2),
            "ours": train(settings(folder, "both", **four), several),
        }
        watch.write("LLaMA-Factory, two negatives", packages, runs)


if __name__ == "__main__":
    main()
