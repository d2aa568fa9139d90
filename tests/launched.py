"""What every process of a launcher runs for test_launch.py: NaPOTrainer with several settings in turn."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from datasets import load_from_disk
from peft import LoraConfig

import tiny
from napo_loss import fused_head
from napo_loss.trl import NaPOConfig
from trainers import NAMES, Gradients, Recorded, pairs, whole

BATCH, STEPS = 4, 2  # pairs per step on all ranks together
VARIANTS = {
    "paper": {},
    "mean": {"q_from": "all_pairs"},  # with as many pairs on every rank the same numbers, by another way
    "dynamic": {"negative_weights": "dynamic", "average_logps": True, "sft_weight": 0.1, "q_decay": 0.5},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 1, "gradient_checkpointing": True},
    "vision": {"kind": "vision"},
    # q of what two micro-batches hold on all ranks:
    "batch": {"q_over": "batch", "gradient_accumulation_steps": 2, "average_logps": True, "q_decay": 0.5},
}
MODELS = {"text": tiny.llama(), "vision": tiny.llava()}  # made before DeepSpeed is, which would shard them at once
RAGGED = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
UNEVEN = {"accelerator_config": {"even_batches": False}, "q_over": "batch", "gradient_accumulation_steps": 2}
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # does something from the start
KEPT = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1, "q_decay": 0.5}


def save_pairs(folder: Path) -> Path:
    """On disk, so that ranks share the cache of precomputed log-probs."""
    pairs().save_to_disk(str(folder / "train"))
    pairs(range(8, 16)).save_to_disk(str(folder / "held out"))
    tiny.vision_pairs(8).save_to_disk(str(folder / "images"))
    return folder


def trainer_for(folder, *, kind="text", how="one", ranks=1, data=None, extra=None, **options) -> Recorded:
    """Plain SGD and no clipping: weights move by the gradient, so that rounding stays rounding."""
    defaults = {
        "per_device_train_batch_size": BATCH // ranks, "per_device_eval_batch_size": BATCH // ranks,
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": not how.startswith("zero"), "bf16": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, "ddp_backend": None if how == "one" else "gloo",
    }  # fmt: skip
    args = NaPOConfig(str(folder), **{**defaults, **options})
    if how == "fsdp2":
        # accelerate 1.15 shards on GPUs only: on CPU `--use_fsdp` quietly gives DDP. Told that these were GPU ranks
        # (their device stays the CPU), it takes its FSDP2 path, which torch runs with gloo.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    model, policy = copy.deepcopy(MODELS[kind]), copy.deepcopy(MODELS[kind])
    torch.manual_seed(1)
    with torch.no_grad():  # margins differ from 0
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return Recorded(
        policy, None if args.precompute_ref_log_probs else model, args, callbacks=[Gradients()],
        train_dataset=data or (pairs() if kind == "text" else tiny.vision_pairs(8)),
        processing_class=tiny.tokenizer() if kind == "text" else tiny.processor(), **(extra or {}),
    )  # fmt: skip


def trained(trainer: Recorded, **kwargs) -> dict:
    """Trains, and returns what must not depend on how many processes did it."""
    trainer.train(**kwargs)
    (recorder,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))
    weights = {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"steps": trainer.steps, "gradients": recorder.steps, "weights": weights}


def everything(folder: Path, how: str = "one", ranks: int = 1) -> dict:
    """The results of every variant; on one and two ranks also of ragged data and of what surrounds training."""
    same = {"how": how, "ranks": ranks}
    results = {}
    for name, options in VARIANTS.items():
        trainer = trainer_for(folder / name, **same, **options)
        results[name] = trained(trainer)
        results[name]["wrapped"] = [type(trainer.model_wrapped).__name__, type(trainer.ref_model).__name__]
        results[name]["evaluated"] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    if ranks == 4:
        return results
    # accelerate fills the last batches up with rows from the start: one process sees that with row 0 there twice.
    rows = range(7) if ranks > 1 else [*range(7), 0]
    results["ragged"] = trained(trainer_for(folder / "ragged", **same, data=pairs(rows), **RAGGED))
    uneven = {"accelerator_config": {"even_batches": False}, "q_from": "all_pairs"}
    results["uneven"] = trained(trainer_for(folder / "uneven", **same, data=pairs(range(7)), **RAGGED, **uneven))
    train, held_out = (load_from_disk(str(folder.parent / name)) for name in ("train", "held out"))
    kept = {**same, **KEPT, "data": train, "extra": {"eval_dataset": held_out}}
    first = trainer_for(folder / "kept", **kept)
    results["kept"] = trained(first) | {
        "evaluated": first.evaluate()["eval_loss"],
        "moments": first.napo.previous_moments,
    }
    results["kept"]["reference"] = first.ref_model
    first.save_model(str(folder / "saved"))
    resumed = trainer_for(folder / "resumed", **kept)
    results["resumed"] = trained(resumed, resume_from_checkpoint=str(folder / "kept/checkpoint-1")) | {
        "moments": resumed.napo.previous_moments
    }
    results["uneven batch"] = trained(
        trainer_for(folder / "uneven batch", **same, data=pairs(range(7)), **RAGGED, **UNEVEN)
    )
    results["in memory"] = trained(trainer_for(folder / "memory", **same, **KEPT))
    results["images"] = kept_images(folder, **same)
    if how != "fsdp2":  # where it is refused
        kept |= {"save_strategy": "no", "extra": {"peft_config": copy.deepcopy(ADAPTER)}}
        results["adapter"] = trained(trainer_for(folder / "adapter", **kept))
    return results


def kept_images(folder: Path, **same) -> dict:
    """The reference's log-probs of images: computed, then found; the ranks that find them compute nothing."""
    images = load_from_disk(str(folder.parent / "images"))
    options = {**same, "kind": "vision", "data": images, "precompute_ref_log_probs": True}
    first = trainer_for(folder / "images", **options)
    columns = [first.train_dataset[f"ref_{name}_logps"] for name in ("chosen", *NAMES)]
    results = trained(first) | {"columns": torch.tensor(columns), "reference": first.ref_model}
    passes, once = [], Recorded.reference_logps
    Recorded.reference_logps = lambda *a, **k: passes.append(1) or once(*a, **k)
    try:
        trainer_for(folder / "images again", **options)
    finally:
        Recorded.reference_logps = once
    return results | {"passes": len(passes)}


def zero3_head() -> dict:
    """``fused_head`` under ZeRO-3 without a trainer: log-probs of this rank's rows and the gradient over all ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard these small parameters, too
    config["zero_allow_untested_optimizer"] = True
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    ids = head_batch()[rows]
    with fused_head(engine):
        logps = engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    engine.backward(logps.sum.mean())
    gathered = [torch.zeros_like(logps.sum) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, logps.sum.detach())
    gradients = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    assert all(p.numel() == 0 for p in model.parameters())  # sharded again
    return {"logps": torch.cat(gathered), "gradients": gradients}


def head_batch() -> torch.Tensor:
    return torch.randint(4, 20, (4, 7), generator=torch.Generator().manual_seed(0))


class Failing:
    """A collator that works for one batch."""

    def __init__(self, collator):
        self.collator, self.calls = collator, 0

    def __call__(self, examples):
        self.calls += 1
        if self.calls == 3:  # accelerate collates one batch ahead
            raise RuntimeError("this batch is broken")
        return self.collator(examples)


def one_rank_fails(folder: Path, ranks: int) -> None:
    trainer = trainer_for(folder, ranks=ranks, max_steps=50)
    if dist.get_rank() == 1:
        trainer.data_collator = Failing(trainer.data_collator)
    trainer.train()


if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    for how in sys.argv[2:]:
        if how == "fails":
            one_rank_fails(folder, ranks)
        results = everything(folder / how, how, ranks)
        if how == "zero3":
            results["head"] = zero3_head()
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{how}.pt")
    assert dist.get_world_size() == ranks
    dist.barrier()
    os._exit(0)  # an orderly end can hang: DDP's reducer, freed last, joins a gloo thread that waits for Python
