"""NaPO in a plain PyTorch loop: no trainer, no other library. Swap in your model and your pairs.

python examples/plain_loop.py
"""

import copy

import torch

from napo_loss import napo_loss, sequence_logps

PAIRS = [  # prompt, chosen, rejected: byte tokens, to need no tokenizer
    ("What colour is the bear in the snow? ", "White.", "Brown."),
    ("What colour is the bear in the wood? ", "Brown.", "Green."),
    ("How many wheels has the tricycle? ", "Three.", "Four."),
    ("How many wheels has the bicycle? ", "Two.", "Four."),
]


def batch(pairs: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, all chosen and then all rejected; prompt and padding are -100 in the labels."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    T = max(len(p + answer) for p, answer in rows)
    ids, labels = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -100)
    for n, (prompt, answer) in enumerate(rows):
        text = torch.tensor(list((prompt + answer).encode()))
        ids[n, : len(text)] = text
        labels[n, len(prompt) : len(text)] = text[len(prompt) :]
    return ids, labels


class Model(torch.nn.Module):
    """Stands for yours: ids ``[N, T]`` to logits ``[N, T, V]``."""

    def __init__(self, V: int = 256, D: int = 64):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V)
        self.body = torch.nn.GRU(D, D, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids))[0])


def main() -> None:
    torch.manual_seed(0)
    policy = Model()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    ids, labels = batch(PAIRS)
    with torch.no_grad():
        reference_chosen, reference_rejected = sequence_logps(reference(ids), labels).pairs()
    for step in range(30):
        chosen, rejected = sequence_logps(policy(ids), labels).pairs()
        out = napo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
        losses, chosen_rewards, rejected_rewards = out
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        margin = (chosen_rewards - rejected_rewards).mean().item()
        if step % 5 == 0 or step == 29:
            print(f"step {step:2}  loss {losses.mean().item():.4f}  reward margin {margin:6.3f}  q {out.q.item():.3f}")


if __name__ == "__main__":
    main()
