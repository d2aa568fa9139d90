"""accelerate: the page's loop, wrapped in DDP."""

import torch
from accelerate import Accelerator

from trainer_recipes import loops, page, watch


def train(recipe=None) -> dict:
    model, reference = loops.models()
    before, watched = watch.weights(model), watch.Watched(recipe)
    found = page.names(page.code("accelerate"))
    found["napo_loss"] = watched
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    found["train"](Accelerator(cpu=True), model, reference, optimizer, loops.encoded())
    losses = [call["loss"] for call in watched.calls]
    return {"losses": losses, "calls": watched.calls, "moved": watch.distance(before, model)}


def main() -> None:
    Accelerator(cpu=True)  # starts the group
    runs = {"theirs": {"losses": loops.plain_dpo()}, "q0": train(watch.DPO), "ours": train()}
    watch.write("accelerate", ["accelerate", "transformers"], runs)


if __name__ == "__main__":
    main()
