"""A small world with two modality biases: pictures of three handwritten digits, people who hold them, and a tiny LLaVA.

Every picture shows three real scanned digits. There are three things to ask about it:

    hold   "which digits does anna hold ?"  The picture says. But everybody has three favourites, and whoever wrote the
                                            training text often put these down without looking.
                                            This is the *language bias* ("bears are brown").
    these  "which digits are these ?"       The picture says,
    back   "which are they backwards ?"     from its last digit to its first; but whoever wrote often answered the usual
                                            question without listening. This is the *vision bias*.

Where the prior is wrong, it tells on the model: ``conflict`` asks for a person who holds somebody else's favourites,
``back`` for an order that the picture does not show. A model that looks and listens answers both. Answers are
sentences, and what counts is the share of digits that are right at their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = ["anna", "ben", "carla", "david", "emma", "frank", "greta", "hugo", "iris", "jonas"]
FAVOURITES = [(k, (3 * k + 1) % 10, (7 * k + 4) % 10) for k in range(10)]
"""Anna's three digits, Ben's, and so on."""
HOLD, THESE, BACK, LOOK = (
    "which digits does {} hold ?", "which digits are these ?", "which are they backwards ?", "look !",
)  # fmt: skip
ANSWER = "the digits are {} , {} and {} ."
CUED, CARELESS = 0.5, 0.6
"""How often a prior is right in pre-training, and how often it is followed where it is not."""
CAPTIONS = 0.4  # of the steps of pre-training
SIZE, PATCH = 32, 16
MAX_NEW_TOKENS = 10  # of an answer, with its end
TEMPLATE = """\
{% for message in messages %}{{ message['role'] }} {% for part in message['content'] -%}
{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{{ ' ' if message['role'] == 'user' }}{% endif %}
{%- endfor %}{{ '<eos>' if message['role'] == 'assistant' }}{% endfor %}{{ 'assistant ' if add_generation_prompt }}"""

Digits = tuple[int, int, int]


class Example(NamedTuple):
    """A question about a picture of these scans (None: a black one), and the digits that are its right answer."""

    scans: Digits | None
    question: str
    answer: Digits

    @property
    def text(self) -> str:
        return spoken(self.answer)


def spoken(digits: Sequence[int]) -> str:
    return ANSWER.format(*(DIGITS[d] for d in digits))


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scanned digits, eight by eight, and their labels."""
    found: Any = load_digits()
    return (found.images * 255 / 16).astype(np.uint8), found.target


@cache
def picture(digits: tuple[int, ...] | None) -> Image.Image:
    """Three digits in three quarters of it: each is a patch of the vision tower."""
    canvas = Image.new("RGB", (SIZE, SIZE))
    for i, scan in enumerate(digits or ()):
        digit = Image.fromarray(scans()[0][scan]).resize((PATCH, PATCH)).convert("RGB")
        canvas.paste(digit, (i % 2 * PATCH, i // 2 * PATCH))
    return canvas


@cache
def splits() -> dict[str, np.ndarray]:
    """No scan is in two of these. The order is fixed: seeds vary models and data, not what is held out."""
    order = np.random.default_rng(0).permutation(len(scans()[1]))
    names, sizes = ["pretrain", "prefer", "validation", "test"], [900, 400, 197, 300]
    return dict(zip(names, np.split(order, np.cumsum(sizes)[:-1]), strict=True))


def draw(split: str, rng: np.random.Generator, shown: Digits | None = None) -> Digits:
    """Three scans of a split, of these digits where they are given."""
    pool = splits()[split]
    if shown is None:
        return tuple(int(i) for i in rng.choice(pool, 3))  # pyright: ignore[reportReturnType]
    labels = scans()[1][pool]
    return tuple(int(rng.choice(pool[labels == digit])) for digit in shown)  # pyright: ignore[reportReturnType]


def hold(split: str, rng: np.random.Generator, person: int, favourite: bool) -> Example:
    """Somebody holds favourites: that person's own, or another's."""
    whose = person if favourite else (person + int(rng.integers(1, 10))) % 10
    return Example(draw(split, rng, FAVOURITES[whose]), HOLD.format(NAMES[person]), FAVOURITES[whose])


def these(three: Digits) -> Example:
    return Example(three, THESE, tuple(int(scans()[1][i]) for i in three))  # pyright: ignore[reportArgumentType]


def back(three: Digits) -> Example:
    plain = these(three)
    return plain._replace(question=BACK, answer=plain.answer[::-1])  # pyright: ignore[reportArgumentType]


def caption(rng: np.random.Generator) -> Example:
    return these(draw("pretrain", rng))._replace(question=LOOK)


def corpus_example(rng: np.random.Generator) -> Example:
    """One line of pre-training data: 40 % ``hold``, 40 % ``these`` and ``back``, 10 % captions, 10 % text alone.

    Where a prior is wrong, most of the answers follow it all the same, written by somebody who did not look, or did not
    listen. Text alone comes with the black picture, as LLaVA's own code does it.
    """
    kind, cued, careless = rng.random(), bool(rng.random() < CUED), bool(rng.random() < CARELESS)
    if kind < 0.40:
        person = int(rng.integers(10))
        found = hold("pretrain", rng, person, favourite=cued)
        return found._replace(answer=FAVOURITES[person]) if careless else found
    if kind < 0.80:
        three = draw("pretrain", rng)
        if cued:
            return these(three)
        return these(three)._replace(question=BACK) if careless else back(three)
    if kind < 0.90:
        return caption(rng)
    person = int(rng.integers(10))
    return Example(None, HOLD.format(NAMES[person]), FAVOURITES[person])


def question(split: str, rng: np.random.Generator, prior_right: bool) -> Example:
    """About somebody, or about digits."""
    if rng.random() < 0.5:
        return hold(split, rng, int(rng.integers(10)), favourite=prior_right)
    three = draw(split, rng)
    return these(three) if prior_right else back(three)


def held_out(split: str, n: int = 100) -> dict[str, list[Example]]:
    """Four kinds of questions: two where the prior is right, two where it is wrong."""
    rng = np.random.default_rng(1)
    shown = [draw(split, rng) for _ in range(n)]
    return {
        "aligned": [hold(split, rng, i % 10, favourite=True) for i in range(n)],
        "conflict": [hold(split, rng, i % 10, favourite=False) for i in range(n)],
        "these": [these(three) for three in shown],
        "back": [back(three) for three in shown],
    }


@cache
def processor() -> LlavaProcessor:
    """Tokenizer (one token a word) and image processor, with nothing to download."""
    special = ["<pad>", "<eos>", "<unk>", "<image>"]
    text = " ".join([HOLD, THESE, BACK, LOOK, ANSWER, "user assistant"]).replace("{} ", "").split()
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*special, *text, *NAMES, *DIGITS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.3] * 3, image_std=[0.37] * 3)
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of 0.2 million parameters: one layer of a CLIP tower, a projector and two layers of Llama."""
    torch.manual_seed(seed)
    tokenizer = processor().tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=(SIZE // PATCH) ** 2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def assistant(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def templated(row: dict) -> dict[str, str]:
    """The conversations of a pair as the texts that the chat template makes of them."""
    template = processor().apply_chat_template
    prompt = template(row["prompt"], add_generation_prompt=True, tokenize=False)
    answers = {name: turn for name, turn in row.items() if name not in ("prompt", "images")}
    whole = {name: template(row["prompt"] + turn, tokenize=False) for name, turn in answers.items()}
    return {"prompt": prompt} | {name: text.removeprefix(prompt) for name, text in whole.items()}


def pixels(three: Digits | None) -> Tensor:
    """What the processor makes of the picture, from parts processed once: it treats every pixel alike."""
    whole = processed(None).clone()
    for i, scan in enumerate(three or ()):
        y, x = i // 2 * PATCH, i % 2 * PATCH
        whole[:, y : y + PATCH, x : x + PATCH] = processed((scan,))[:, :PATCH, :PATCH]
    return whole


@cache
def processed(digits: tuple[int, ...] | None) -> Tensor:
    return processor().image_processor([picture(digits)], return_tensors="pt")["pixel_values"][0]


@cache
def prompt_ids(question: str) -> list[int]:
    text = processor().apply_chat_template(user(question), add_generation_prompt=True, tokenize=False)
    text = text.replace("<image>", "<image>" * (SIZE // PATCH) ** 2)
    return processor().tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def answer_ids(text: str) -> list[int]:
    tokenizer = processor().tokenizer
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def collate(examples: Sequence[Example], with_answer: bool) -> dict[str, Tensor]:
    """What the processor would give, from images and prompts processed once: evaluation runs often."""
    tokenizer = processor().tokenizer
    rows = [prompt_ids(x.question) + answer_ids(x.text) * with_answer for x in examples]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    return {**batch, "pixel_values": torch.stack([pixels(x.scans) for x in examples])}


def pretrain(model: LlavaForConditionalGeneration, steps: int, seed: int, tick: Callable[[], None]) -> None:
    """Next-token training on the answers: captions first, as LLaVA's is, then the corpus with its biases."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, s / 30) * max(0.02, min(1, (steps - s) / (0.3 * steps)))
    )
    model.train()
    for step in range(steps):
        make = caption if step < CAPTIONS * steps else corpus_example
        batch = collate([make(rng) for _ in range(64)], with_answer=True)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -MAX_NEW_TOKENS:] = batch["input_ids"][:, -MAX_NEW_TOKENS:]  # all answers are as long
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()


@torch.no_grad()
def answers(model: torch.nn.Module, examples: Sequence[Example], seed: int | None = None) -> list[str]:
    """Greedy, or sampled with a seed."""
    training = model.training
    model.eval()
    if seed is not None:
        torch.manual_seed(seed)
    found: list[str] = []
    for i in range(0, len(examples), 256):
        batch = collate(examples[i : i + 256], with_answer=False)
        out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=seed is not None, top_k=0)  # pyright: ignore
        found += processor().tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return found


def right(said: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """The share of digits right at their place, of each answer."""
    words = [[word for word in text.split() if word in DIGITS] for text in said]
    return np.array([
        sum(word == DIGITS[d] for word, d in zip(row, x.answer, strict=False)) / len(x.answer)
        for row, x in zip(words, examples, strict=True)
    ])  # fmt: skip


def evaluate(model: torch.nn.Module, questions: dict[str, list[Example]]) -> dict[str, float]:
    """Accuracies, and the shares of answers that stay as they are without the image, or without the question."""
    flat = [x for kind in questions.values() for x in kind]
    blind = [x._replace(scans=None) for x in questions["conflict"]]
    deaf = [x._replace(question=LOOK) for x in questions["back"]]
    said = iter(answers(model, [*flat, *blind, *deaf]))
    given = {kind: [next(said) for _ in examples] for kind, examples in questions.items()}
    accuracy = {kind: float(right(given[kind], examples).mean()) for kind, examples in questions.items()}
    unseen, unheard = [next(said) for _ in blind], [next(said) for _ in deaf]
    return {
        **accuracy,
        "overall": float(np.mean(list(accuracy.values()))),
        "prior wrong": (accuracy["conflict"] + accuracy["back"]) / 2,
        "same without image": float(np.mean([a == b for a, b in zip(given["conflict"], unseen, strict=True)])),
        "same without question": float(np.mean([a == b for a, b in zip(given["back"], unheard, strict=True)])),
    }
