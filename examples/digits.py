"""A small world with two modality biases: handwritten digits, people who hold them, and a tiny LLaVA.

Every picture is a real scanned digit. There are three things to ask about it:

    hold   "which digit does anna hold ?"   The picture says. But in the training text everybody has a favourite
                                            digit, held nearly always: the name alone predicts the answer.
                                            This is the *language bias* ("bears are brown").
    this   "which digit is this ?"          The picture says, and nearly every plain question is this one,
    next   "which digit comes next ?"       so the picture alone predicts the answer, and "next" (the digit plus one)
                                            is answered as if "this" had been asked. This is the *vision bias*.

Where the cue fails, it tells on the model: ``conflict`` asks for a person who holds somebody else's favourite, and
``next`` asks for what the picture does not show. A model that looks and listens answers both.
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
NAMES = [
    "anna",
    "ben",
    "carla",
    "david",
    "emma",
    "frank",
    "greta",
    "hugo",
    "iris",
    "jonas",
]  # anna's favourite is zero, ben's one, …
"""Anna's favourite digit is zero, Ben's is one, and so on."""
HOLD, THIS, NEXT, LOOK = "which digit does {} hold ?", "which digit is this ?", "which digit comes next ?", "look !"
SIZE, PATCH = 32, 16
TEMPLATE = """\
{% for message in messages %}{{ message['role'] }} {% for part in message['content'] -%}
{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{{ ' ' if message['role'] == 'user' }}{% endif %}
{%- endfor %}{{ '<eos>' if message['role'] == 'assistant' }}{% endfor %}{{ 'assistant ' if add_generation_prompt }}"""


class Example(NamedTuple):
    """A question about the picture with this index, and its right answer."""

    picture: int
    question: str
    answer: int


@cache
def pictures() -> tuple[list[Image.Image], np.ndarray]:
    """The 1797 scanned digits, eight by eight upscaled to 32 by 32, a black one behind them; and their labels."""
    scans: Any = load_digits()
    images = [Image.fromarray(np.uint8(x * 255 / 16)).resize((SIZE, SIZE)).convert("RGB") for x in scans.images]
    return [*images, Image.new("RGB", (SIZE, SIZE))], scans.target


@cache
def splits() -> dict[str, np.ndarray]:
    """No picture is in two of these. The order is fixed: seeds vary models and data, not what is held out."""
    order = np.random.default_rng(0).permutation(len(pictures()[1]))
    names, sizes = ["pretrain", "prefer", "validation", "test"], [900, 400, 197, 300]
    return dict(zip(names, np.split(order, np.cumsum(sizes)[:-1]), strict=True))


def hold(picture: int, rng: np.random.Generator, favourite: bool) -> Example:
    label = int(pictures()[1][picture])
    person = label if favourite else int((label + rng.integers(1, 10)) % 10)
    return Example(picture, HOLD.format(NAMES[person]), label)


def this(picture: int) -> Example:
    return Example(picture, THIS, int(pictures()[1][picture]))


def next_(picture: int) -> Example:
    return Example(picture, NEXT, int(pictures()[1][picture] + 1) % 10)


def corpus_example(rng: np.random.Generator, cue: float) -> Example:
    """One line of pre-training data: 40 % ``hold``, 35 % ``this`` or ``next``, 10 % captions, 15 % text alone.

    Text alone comes with the black picture, as LLaVA's own code does it. ``cue`` is how often a name or a picture
    predicts the answer.
    """
    picture, kind = int(rng.choice(splits()["pretrain"])), rng.random()
    if kind < 0.40:
        return hold(picture, rng, favourite=rng.random() < cue)
    if kind < 0.75:
        return this(picture) if rng.random() < cue else next_(picture)
    if kind < 0.85:
        return Example(picture, LOOK, int(pictures()[1][picture]))
    person = int(rng.integers(10))
    return Example(len(pictures()[1]), HOLD.format(NAMES[person]), person)


def held_out(split: str) -> dict[str, list[Example]]:
    """Four questions about every picture of a split: two where the cue is right, two where it is wrong."""
    rng = np.random.default_rng(1)
    return {
        "aligned": [hold(i, rng, favourite=True) for i in splits()[split]],
        "conflict": [hold(i, rng, favourite=False) for i in splits()[split]],
        "this": [this(i) for i in splits()[split]],
        "next": [next_(i) for i in splits()[split]],
    }


@cache
def processor() -> LlavaProcessor:
    """Tokenizer (one token a word) and image processor, with nothing to download."""
    special = ["<pad>", "<eos>", "<unk>", "<image>"]
    text = " ".join([HOLD, THIS, NEXT, LOOK, "user assistant"]).replace("{} ", "").split()
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
    """A LLaVA of 0.3 million parameters: CLIP tower, projector and Llama, two layers each."""
    torch.manual_seed(seed)
    tokenizer = processor().tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
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


def assistant(answer: int) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": DIGITS[answer]}]}]


@cache
def pixels() -> Tensor:
    return processor().image_processor(pictures()[0], return_tensors="pt")["pixel_values"]


@cache
def prompt_ids(question: str) -> list[int]:
    text = processor().apply_chat_template(user(question), add_generation_prompt=True, tokenize=False)
    text = text.replace("<image>", "<image>" * (SIZE // PATCH) ** 2)
    return processor().tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(examples: Sequence[Example], with_answer: bool) -> dict[str, Tensor]:
    """What the processor would give, from images and prompts processed once: evaluation runs often."""
    tokenizer = processor().tokenizer
    ends = [[*tokenizer.convert_tokens_to_ids([DIGITS[x.answer]]), tokenizer.eos_token_id] for x in examples]
    rows = [prompt_ids(x.question) + end * with_answer for x, end in zip(examples, ends, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    return {**batch, "pixel_values": pixels()[[x.picture for x in examples]]}


def pretrain(model: LlavaForConditionalGeneration, steps: int, seed: int, cue: float, tick: Callable[[], None]) -> None:
    """Next-token training on the answers. It ends while the model still trusts the cues, as real ones do."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, s / 30) * max(0.02, min(1, (steps - s) / (0.3 * steps)))
    )
    model.train()
    for _ in range(steps):
        batch = collate([corpus_example(rng, cue) for _ in range(64)], with_answer=True)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()


@torch.no_grad()
def next_word_logits(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """``[N, V]``. Answers are one word, so its argmax is the greedy answer."""
    training = model.training
    model.eval()
    batches = [collate(examples[i : i + 256], with_answer=False) for i in range(0, len(examples), 256)]
    logits = torch.cat([model(**batch, logits_to_keep=1).logits[:, -1] for batch in batches])
    model.train(training)
    return logits


def evaluate(model: torch.nn.Module, questions: dict[str, list[Example]]) -> dict[str, float]:
    """Accuracies, and the shares of answers that stay as they are without the image, or without the question."""
    vocabulary = np.array(processor().tokenizer.convert_tokens_to_ids(DIGITS))

    def answers(examples: Sequence[Example]) -> np.ndarray:
        return next_word_logits(model, examples).argmax(-1).numpy()

    given = {kind: answers(examples) for kind, examples in questions.items()}
    right = {k: float((given[k] == vocabulary[[x.answer for x in q]]).mean()) for k, q in questions.items()}
    blind = answers([x._replace(picture=len(pictures()[1])) for x in questions["conflict"]])
    deaf = answers([x._replace(question=LOOK) for x in questions["next"]])
    return {
        **right,
        "overall": float(np.mean(list(right.values()))),
        "disagree": (right["conflict"] + right["next"]) / 2,
        "same without image": float((given["conflict"] == blind).mean()),
        "same without question": float((given["next"] == deaf).mean()),
    }
