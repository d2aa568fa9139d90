"""One seed of the demo: a biased model, its preference pairs, and every arm trained on them with ``NaPOTrainer``."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from transformers import LlavaForConditionalGeneration, TrainerCallback

from examples.demo import digits
from napo_loss.bias import BiasSettings, add_biased_negatives, natural_noise
from napo_loss.trl import NaPOConfig, NaPOTrainer


@dataclass(frozen=True)
class Arm:
    """What is trained: arguments of ``NaPOConfig``, and what validation chose."""

    name: str
    config: dict[str, Any]
    beta: float
    learning_rate: float


@dataclass(frozen=True)
class Scale:
    """How much of everything; the same for all arms."""

    pretrain_steps: int
    pairs: int
    swapped: tuple[float, ...]  # shares of the pairs
    steps: int
    batch: int
    held_out: int  # questions of each kind


def quiet() -> None:
    """One progress bar is enough, and a reference model that shares the tokenizer needs no advice."""
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Pairs(NamedTuple):
    """The data sets to train on, by the share of pairs that are swapped; and what is wrong with them."""

    datasets: dict[float, Dataset]
    in_fact_right: dict[str, float]


def make_pairs(model: LlavaForConditionalGeneration, scale: Scale, seed: int) -> Pairs:
    """Preferences from the model itself, with its biased answers, and copies with some of the pairs swapped.

    Chosen is the right answer and rejected one that the model samples, with one digit made wrong where it was right.
    In half of the questions the prior is wrong. A swap touches chosen and rejected only: the biased answers know
    nothing of it.
    """
    rng = np.random.default_rng(1000 + seed)
    examples = [digits.question("prefer", rng, prior_right=bool(rng.random() < 0.5)) for _ in range(scale.pairs)]
    rejected = digits.answers(model, examples, seed=seed)
    for i, x in enumerate(examples):
        if rejected[i] == x.text:
            wrong, k = list(x.answer), rng.integers(3)
            wrong[k] = (wrong[k] + rng.integers(1, 10)) % 10
            rejected[i] = digits.spoken(wrong)

    turn = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"prompt": turn, "images": List(Image()), "chosen": turn, "rejected": turn})
    columns = {
        "prompt": [digits.user(x.question) for x in examples],
        "images": [[digits.picture(x.scans)] for x in examples],
        "chosen": [digits.assistant(x.text) for x in examples],
        "rejected": [digits.assistant(answer) for answer in rejected],
    }
    dataset = Dataset.from_dict(columns, features=features)
    settings = BiasSettings(instruction=digits.LOOK, max_new_tokens=digits.MAX_NEW_TOKENS)
    dataset = add_biased_negatives(
        dataset, model, digits.processor(), image_removal="blank", settings=settings, batch_size=100
    )
    order, found = rng.permutation(scale.pairs), natural_noise(dataset)
    texts = dataset.map(digits.templated)  # once, not in every batch of every arm
    return Pairs({rate: _swapped(texts, order[: round(rate * scale.pairs)]) for rate in scale.swapped}, found)


def _swapped(dataset: Dataset, rows: np.ndarray) -> Dataset:
    swap = np.isin(np.arange(len(dataset)), rows)
    both = list(zip(dataset["chosen"], dataset["rejected"], strict=True))
    both = [(b, a) if s else (a, b) for (a, b), s in zip(both, swap, strict=True)]
    rest = dataset.remove_columns(["chosen", "rejected"])
    return rest.add_column("chosen", [a for a, _ in both]).add_column("rejected", [b for _, b in both])


class Watch(TrainerCallback):
    """Ticks, and keeps the q of every step."""

    def __init__(self, tick: Callable[[], None]):
        self.tick = tick
        self.q: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()

    def on_log(self, args, state, control, logs=None, **kwargs):
        q = {k.removeprefix("napo/q/"): v for k, v in (logs or {}).items() if k.startswith("napo/q/")}
        if q:
            self.q.append({"step": state.global_step, **q})


def train_arm(
    base: LlavaForConditionalGeneration, pairs: Dataset, arm: Arm, scale: Scale, seed: int, watch: Watch
) -> LlavaForConditionalGeneration:
    """Every arm starts from the same weights and sees the same pairs in the same order."""
    model = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        config = NaPOConfig(
            output_dir=folder, **arm.config, learning_rate=arm.learning_rate, beta=arm.beta, max_steps=scale.steps,
            per_device_train_batch_size=scale.batch, warmup_steps=10, lr_scheduler_type="constant_with_warmup",
            seed=seed, use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=5, save_strategy="no",
            report_to="none", disable_tqdm=True, max_length=None, token_metrics=False,
        )  # fmt: skip
        trainer = NaPOTrainer(
            model, copy.deepcopy(base), config, train_dataset=pairs, processing_class=digits.processor(),
            callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model


def run_seed(seed: int, arms: list[Arm], scale: Scale, split: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Everything of one seed, from the first weight on."""
    quiet()
    torch.set_num_threads(1)  # seeds run side by side: two processes of one thread beat one of two
    questions = digits.held_out(split, scale.held_out)
    model = digits.build_model(seed)
    digits.pretrain(model, scale.pretrain_steps, seed, tick)
    pairs = make_pairs(model, scale, seed)
    result: dict[str, Any] = {
        "seed": seed, "in fact right": pairs.in_fact_right, "pre-trained": digits.evaluate(model, questions),
        "arms": {},
    }  # fmt: skip
    for arm in arms:
        ends = result["arms"][arm.name] = {}
        for rate, dataset in pairs.datasets.items():
            watch = Watch(tick)
            trained = train_arm(model, dataset, arm, scale, seed, watch)
            ends[f"{rate:g}"] = {"end": digits.evaluate(trained, questions), "q": watch.q}
    return result
