"""Lightning: the page's module under its DDP strategy."""

import tempfile

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from trainer_recipes import loops, page, watch


def train(recipe=None) -> dict:
    model, reference = loops.models()
    before, watched = watch.weights(model), watch.Watched(recipe)
    found = page.names(page.code("Lightning"))
    found["napo_loss"] = watched
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
            default_root_dir=folder,
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(loops.encoded(), batch_size=None)
        trainer.fit(found["Module"](model, reference, 2.0), batches)
    losses = [call["loss"] for call in watched.calls]
    return {"losses": losses, "calls": watched.calls, "moved": watch.distance(before, model)}


def main() -> None:
    dist.init_process_group("gloo")
    runs = {"theirs": {"losses": loops.plain_dpo()}, "q0": train(watch.DPO), "ours": train()}
    watch.write("Lightning", ["lightning", "transformers"], runs)


if __name__ == "__main__":
    main()
