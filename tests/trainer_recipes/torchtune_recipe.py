"""torchtune: its components from the page's YAML, its own model and log-probs, and the step of its DPO recipes.

Its recipes want a checkpoint in its own formats; of recipes/full_dpo_distributed.py the lines around the loss are here.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torchtune import config, rlhf
from torchtune.models.llama2 import llama2
from torchtune.rlhf.loss import DPOLoss

import tiny
from trainer_recipes import loops, page, watch


def train(loss_fn: torch.nn.Module) -> dict:
    torch.manual_seed(0)
    size = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
    model = llama2(vocab_size=len(tiny.WORDS.split()), **size)
    other = copy.deepcopy(model).requires_grad_(False)
    before, losses = watch.weights(model), []
    for batch in loops.encoded():
        four = []
        for m in (model, other):
            logps = rlhf.get_batch_log_probs(m(batch["input_ids"]), batch["labels"], label_pad_token_id=-100)
            four += [logps[:2], logps[2:]]
        loss, chosen_rewards, rejected_rewards = loss_fn(*four)
        loss = loss.mean()
        (chosen_rewards > rejected_rewards).float()
        losses.append(loss.item())
        loops.step(model, loss)
    return {"losses": losses, "moved": watch.distance(before, model)}


def main() -> None:
    dist.init_process_group("gloo")
    cfg = OmegaConf.create(page.code("torchtune", languages="yaml"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "losses.py").write_text(page.code("torchtune"))
        sys.path.insert(0, folder)
        os.chdir(folder)
        runs = {"theirs": train(DPOLoss(beta=cfg.loss.beta))}
        for name, recipe in (("q0", watch.DPO), ("ours", None)):
            watched = watch.Watched(recipe)
            watch.watch_module(watched)
            runs[name] = {**train(config.instantiate(cfg.loss)), "calls": watched.calls}
        os.chdir("/")
    watch.write("torchtune", ["torchtune"], runs)


if __name__ == "__main__":
    main()
