"""Four ways to train one toy: the numbers that ``NaPOTrainer`` logs, under its own names.

Three digits in words, to be named in ascending order. The reference names them in the order given more often than not,
and that is the rejected answer; ``question_only`` is one to other digits. Some pairs are swapped.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from examples.noise_study.tasks import WORDS, Questions, questions
from napo_loss.trl import NaPOConfig, NaPOTrainer

BATCH, EVERY, STEPS = 16, 4, 72
HELD_OUT = 192  # pairs of the same making, noise included: nobody has others
BETA = 0.1
NEGATIVES = {
    "rejected": {"estimator": "moment"},  # reads how many pairs point the wrong way
    "question_only": {"estimator": "released", "alpha": 0.1},  # reads how far training is
}
NAMES = tuple(NEGATIVES)
LOGGED = (
    "loss", "grad_norm", "logps/chosen", "rewards/chosen", "rewards/margins", "rewards/accuracies",
    *(f"{kind}/{name}" for kind in ("rewards/margins", "rewards/accuracies") for name in NAMES),
    *(f"napo/{kind}/{name}" for kind in ("q", "weight") for name in NAMES),
)  # fmt: skip
EVALUATED = ("eval_rewards/margins/rejected", "eval_rewards/accuracies/rejected", "eval_napo/q/rejected")


class Way(NamedTuple):
    """One run but for its seed."""

    pairs: int
    swapped: float
    learning_rate: float = 1e-3


WAYS = {
    "healthy": Way(1280, 0.0),
    "noisy": Way(1280, 0.3),
    "diverging": Way(1280, 0.0, learning_rate=3e-2),
    "memorising": Way(64, 0.3),
}
SEEDS = (0, 1)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "sorted:", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def spell(digits: np.ndarray) -> list[str]:
    return [" " + " ".join(WORDS[d] for d in row) for row in digits]


def prompts(asked: Questions) -> list[str]:
    return [" ".join(WORDS[d] for d in row) + " sorted:" for row in asked.habitual]


@lru_cache
def reference(seed: int) -> Any:
    """A model that has the habit: two answers of three name the digits as they were given."""
    torch.manual_seed(seed)
    rng, words = np.random.default_rng(seed), tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / 300)
        asked = questions("text", "pretrain", 64, rng)
        said = np.where(rng.random((64, 1)) < 0.67, asked.habitual, asked.right)
        ids = torch.tensor(
            words([p + a + " </s>" for p, a in zip(prompts(asked), spell(said), strict=True)])["input_ids"]
        )
        labels = ids.clone()
        labels[:, :4] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def pairs(split: str, n: int, swapped: float, seed: int) -> Dataset:
    """Preferences over two answers of three wrong ones; a share of them with chosen and rejected swapped."""
    rng = np.random.default_rng(1000 + seed)
    asked = questions("text", split, n, rng)
    wrong = asked.habitual.copy()
    right = (wrong == asked.right).all(1)  # what is given in order already: one digit is made wrong
    wrong[right, 0] = (wrong[right, 0] + rng.integers(1, 10, right.sum())) % 10
    other = np.sort(rng.integers(0, 10, wrong.shape), 1)
    same = (other == asked.right).all(1)
    other[same, 0] = (other[same, 0] + 1) % 10
    columns = {"prompt": prompts(asked), "chosen": spell(asked.right), "rejected": spell(wrong)}
    for i in rng.choice(n, round(swapped * n), replace=False):
        columns["chosen"][i], columns["rejected"][i] = columns["rejected"][i], columns["chosen"][i]
    return Dataset.from_dict({**columns, "question_only": spell(other)})


def run(name: str, seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """A row for every logged step."""
    way, kept = WAYS[name], _Kept()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for quiet in (redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings()):
            stack.enter_context(quiet)
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        disable_progress_bar()
        config = NaPOConfig(
            folder, negatives=NEGATIVES, negative_weights="dynamic", q_decay=0.9, beta=BETA, max_steps=steps,
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=HELD_OUT, learning_rate=way.learning_rate,
            lr_scheduler_type="constant", logging_steps=EVERY, eval_strategy="steps", eval_steps=5 * EVERY,
            eval_on_start=True, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False,
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=seed, token_metrics=False,
        )  # fmt: skip
        policy, frozen = (copy.deepcopy(reference(seed)) for _ in range(2))  # TRL changes both
        trainer = NaPOTrainer(
            policy, frozen, config, train_dataset=pairs("pairs", way.pairs, way.swapped, seed),
            eval_dataset=pairs("valid", HELD_OUT, way.swapped, seed), processing_class=tokenizer(), callbacks=[kept],
        )  # fmt: skip
        trainer.train()
    return [{"run": name, "seed": seed, "step": step, **row} for step, row in sorted(kept.rows.items())]


class _Kept(TrainerCallback):
    def __init__(self):
        self.rows: dict[int, dict[str, float]] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        wanted = {name: x for name, x in (logs or {}).items() if name in LOGGED + EVALUATED}
        if wanted:
            self.rows.setdefault(state.global_step, {}).update({"epoch": state.epoch or 0.0, **wanted})
