"""A small decoder that looks at what is given, and its pre-training into a habit."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.noise_study import tasks
from examples.noise_study.tasks import DIGITS, END, HABIT, LENGTH, LETTERS, START

WIDTH, HEADS = 48, 2
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_RATE = 400, 64, 3e-3


class Speller(nn.Module):
    def __init__(self, task: str):
        super().__init__()
        seen = nn.Linear(64, WIDTH) if task == "pictures" else nn.Embedding(10, WIDTH)
        self.seen = nn.Sequential(seen, nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.place = nn.Parameter(torch.randn(DIGITS, WIDTH) * 0.1)
        self.embed, self.time = nn.Embedding(len(LETTERS), WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, given: Tensor, ids: Tensor) -> Tensor:
        """Logits ``[n, T, letters]``."""
        T = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        x = self.embed(ids) + self.time[:T]
        return self.head(self.decoder(x, self.seen(given) + self.place, tgt_mask=mask, tgt_is_causal=True))


@torch.no_grad()
def answers(
    model: nn.Module, given: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> list[str]:
    ids = torch.full((len(given), 1), START)
    ended = torch.zeros(len(given), dtype=torch.bool)
    while ids.shape[1] < LENGTH and not ended.all():
        logits = model(given, ids)[:, -1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            new = logits.argmax(-1)
        new = new.masked_fill(ended, END)
        ended |= new == END
        ids = torch.cat([ids, new[:, None]], 1)
    texts = ["".join(LETTERS[i] for i in row) for row in ids.tolist()]
    return [text[: text.index("$") + 1] if "$" in text else text for text in texts]


@lru_cache
def pretrained(task: str, seed: int) -> nn.Module:
    """Of one seed there is one model, which all losses start from; a copy is to be trained."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng(seed), Speller(task)
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_RATE)
    for step in range(PRETRAIN_STEPS):
        optimizer.param_groups[0]["lr"] = PRETRAIN_RATE * min(1, step / 30) * max(0.05, 1 - step / PRETRAIN_STEPS)
        asked = tasks.questions(task, "pretrain", PRETRAIN_BATCH, rng)
        said = np.where(rng.random((PRETRAIN_BATCH, 1)) < HABIT, asked.habitual, asked.right)
        commas = rng.random(PRETRAIN_BATCH) < 0.5
        ids, labels = tasks.encode([tasks.spell(d, c) for d, c in zip(said, commas, strict=True)])
        logits = model(asked.given, ids)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


def to_train(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_()
