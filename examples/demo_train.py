"""One seed of the demo: a biased model, its preference pairs, and every arm trained on them with ``NaPOTrainer``."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import digits
import numpy as np
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from transformers import LlavaForConditionalGeneration, TrainerCallback

from napo_loss.bias import BiasSettings, add_biased_negatives, natural_noise
from napo_loss.trl import NaPOConfig, NaPOTrainer


@dataclass(frozen=True)
class Arm:
    """What is trained: the negatives with their settings, and what validation chose."""

    name: str
    negatives: dict[str, dict[str, Any]]
    learning_rate: float
    beta: float


@dataclass(frozen=True)
class Scale:
    """How much of everything; the same for all arms."""

    pretrain_steps: int
    cue: float
    pairs: int
    flipped: float
    steps: int
    batch: int
    evaluations: int


def quiet() -> None:
    """One progress bar is enough, and a reference model that shares the tokenizer needs no advice."""
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class Pairs(NamedTuple):
    """The data set to train on; and the questions behind it, whose right answers no trainer sees."""

    dataset: Dataset
    examples: list[digits.Example]
    noise: dict[str, Any]


def make_pairs(model: LlavaForConditionalGeneration, n: int, flipped: float, seed: int) -> Pairs:
    """Preferences from the model itself, with its biased answers and a share of swapped pairs.

    Chosen is the right answer and rejected a wrong one that the model itself would give (sampled from its answers,
    the right one left out). In half of the questions the cue is wrong. The swap comes last and touches chosen and
    rejected only: the biased answers know nothing of it.
    """
    rng = np.random.default_rng(1000 + seed)
    examples = []
    for picture in rng.choice(digits.splits()["prefer"], n):
        cue = bool(rng.random() < 0.5)
        if rng.random() < 0.5:
            examples.append(digits.hold(picture, rng, favourite=cue))
        else:
            examples.append(digits.this(picture) if cue else digits.next_(picture))
    words = digits.processor().tokenizer.convert_tokens_to_ids(digits.DIGITS)
    logits = digits.next_word_logits(model, examples)[:, words]
    right = torch.tensor([x.answer for x in examples])
    logits.scatter_(1, right[:, None], -torch.inf)
    wrong = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0].tolist()

    turn = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"prompt": turn, "images": List(Image()), "chosen": turn, "rejected": turn})
    columns = {
        "prompt": [digits.user(x.question) for x in examples],
        "images": [[digits.pictures()[0][x.picture]] for x in examples],
        "chosen": [digits.assistant(x.answer) for x in examples],
        "rejected": [digits.assistant(answer) for answer in wrong],
    }
    dataset = Dataset.from_dict(columns, features=features)
    settings = BiasSettings(instruction=digits.LOOK, max_new_tokens=2)
    dataset = add_biased_negatives(
        dataset, model, digits.processor(), image_removal="blank", settings=settings, batch_size=100
    )
    noise: dict[str, Any] = {"in fact right": natural_noise(dataset)}
    flip = rng.random(n) < flipped
    chosen = [b if f else a for a, b, f in zip(dataset["chosen"], dataset["rejected"], flip, strict=True)]
    rejected = [a if f else b for a, b, f in zip(dataset["chosen"], dataset["rejected"], flip, strict=True)]
    dataset = dataset.remove_columns(["chosen", "rejected"])
    dataset = dataset.add_column("chosen", chosen).add_column("rejected", rejected)
    noise |= {"flipped": float(flip.mean()), "same as chosen after flips": natural_noise(dataset)}
    return Pairs(dataset, examples, noise)


class Watch(TrainerCallback):
    """Evaluates at evenly spaced steps, and keeps the q of every step."""

    def __init__(self, questions: dict, every: int, tick: Callable[[], None]):
        self.questions, self.every, self.tick = questions, every, tick
        self.curve: list[dict] = []
        self.q: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.tick()
        if state.global_step % self.every == 0 and model is not None:
            self.curve.append({"step": state.global_step, **digits.evaluate(model, self.questions)})

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
            output_dir=folder, negatives=arm.negatives, learning_rate=arm.learning_rate, beta=arm.beta,
            max_steps=scale.steps, per_device_train_batch_size=scale.batch, warmup_steps=10,
            lr_scheduler_type="cosine", seed=seed, use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True, max_length=None,
        )  # fmt: skip
        trainer = NaPOTrainer(
            model, copy.deepcopy(base), config, train_dataset=pairs, processing_class=digits.processor(),
            callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model


def wrong_lessons(model: torch.nn.Module, base: torch.nn.Module, pairs: Pairs, arm: Arm, q: dict[str, float]) -> float:
    """Share of the gradient that comes from pairs which teach the wrong answer: chosen wrong, negative right.

    A pair pulls with ``weight · p^q · (1 − p)``, ``p = σ(βψ)``. Pairs that set a wrong answer against a wrong one,
    or an answer against itself, teach neither and are left out.
    """
    words = digits.processor().tokenizer

    def ids(column: str) -> torch.Tensor:
        answers = [turns[0]["content"][0]["text"].split() for turns in pairs.dataset[column]]
        return torch.tensor(
            [words.convert_tokens_to_ids(answer[0]) if answer else words.eos_token_id for answer in answers]
        )

    log_ratio = digits.next_word_logits(model, pairs.examples).log_softmax(-1)
    log_ratio -= digits.next_word_logits(base, pairs.examples).log_softmax(-1)
    right = torch.tensor(words.convert_tokens_to_ids([digits.DIGITS[x.answer] for x in pairs.examples]))
    chosen, pulls = ids("chosen"), {True: 0.0, False: 0.0}
    for name, settings in arm.negatives.items():
        negative = ids(name)
        margin = (log_ratio.gather(1, chosen[:, None]) - log_ratio.gather(1, negative[:, None]))[:, 0]
        p = torch.sigmoid(arm.beta * margin)
        pull = settings.get("weight", 1.0) * p ** q[name] * (1 - p)
        pulls[True] += pull[(chosen == right) & (negative != right)].sum().item()
        pulls[False] += pull[(chosen != right) & (negative == right)].sum().item()
    return pulls[False] / (pulls[True] + pulls[False])


def run_seed(seed: int, arms: list[Arm], scale: Scale, split: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Everything of one seed, from the first weight on."""
    quiet()
    torch.set_num_threads(1)  # seeds run side by side: two processes of one thread beat one of two
    questions = digits.held_out(split)
    model = digits.build_model(seed)
    digits.pretrain(model, scale.pretrain_steps, seed, scale.cue, tick)
    pairs = make_pairs(model, scale.pairs, scale.flipped, seed)
    start = digits.evaluate(model, questions)
    result: dict[str, Any] = {"seed": seed, "pairs": pairs.noise, "pre-trained": start, "arms": {}}
    for arm in arms:
        watch = Watch(questions, scale.steps // scale.evaluations, tick)
        trained = train_arm(model, pairs.dataset, arm, scale, seed, watch)
        result["arms"][arm.name] = {
            "curve": [{"step": 0, **start}, *watch.curve],
            "q": watch.q,
            "wrong lessons": [
                wrong_lessons(m, model, pairs, arm, q) for m, q in ((model, watch.q[0]), (trained, watch.q[-1]))
            ],
        }
    return result
