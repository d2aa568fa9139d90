"""FSDP2 and a vocabulary-parallel head: one file for CPUs (gloo) and GPUs (NCCL), for one process or many.

    torchrun --nproc-per-node=4 examples/parallel.py --tp 2

Ranks form a grid. Along ``dp`` FSDP2 shards the parameters and each rank has pairs of its own; along ``tp`` ranks have
the same pairs, and each holds some rows of the lm_head. Whatever the grid, the numbers are those of one process.
"""

import argparse
import os

import torch
import torch.distributed as dist
from plain_loop import PAIRS, batch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaModel

from napo_loss import SequenceLogps, linear_sequence_logps, napo_loss

V, D = 256, 64


class Head(torch.nn.Module):
    """An lm_head of which each rank along ``tp`` holds some rows. FSDP2 shards those once more along ``dp``."""

    def __init__(self, weight: torch.Tensor, tp: DeviceMesh):
        super().__init__()
        self.tp = tp
        self.weight = torch.nn.Parameter(distribute_tensor(weight, tp, [Shard(0)]))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> SequenceLogps:
        # The backbone computed the same on all ranks along tp. Said with a DTensor, it is no guess.
        hidden = DTensor.from_local(hidden, self.tp, [Replicate()], run_check=False)
        return linear_sequence_logps(hidden, self.weight, labels)


class Model(torch.nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        torch.manual_seed(0)  # the same weights on every rank
        config = LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4
        )
        self.backbone = LlamaModel(config)
        self.head = Head(torch.randn(V, D) * 0.02, mesh["tp"])
        self.to(mesh.device_type)
        for layer in (*self.backbone.layers, self.head, self):
            fully_shard(layer, mesh=mesh["dp"])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> SequenceLogps:
        return self.head(self.backbone(input_ids=ids, use_cache=False).last_hidden_state, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the vocabulary")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size() // arguments.tp, arguments.tp), mesh_dim_names=("dp", "tp"))

    policy, reference = Model(mesh), Model(mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    dp = mesh["dp"]
    ids, labels = (x.to(device) for x in batch(PAIRS[dp.get_local_rank() :: dp.size()]))
    with torch.no_grad():
        reference_chosen, reference_rejected = reference(ids, labels).pairs()
    for step in range(arguments.steps):
        chosen, rejected = policy(ids, labels).pairs()
        out = napo_loss(chosen, rejected, reference_chosen, reference_rejected, process_group=dp.get_group())
        optimizer.zero_grad()
        out.losses.mean().backward()  # FSDP2 averages over dp
        optimizer.step()
        loss = out.losses.detach().mean()
        dist.all_reduce(loss)  # for printing alone
        if dist.get_rank() == 0 and (step % 5 == 0 or step == arguments.steps - 1):
            print(f"step {step:2}  loss {loss.item() / dist.get_world_size():.4f}  q {out.q.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
