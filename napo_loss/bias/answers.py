"""What the model answers once :mod:`napo_loss.bias` has taken a modality away: batched generation, resumable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napo_loss.bias.cache import AnswerCache
from napo_loss.bias.removal import conversation, images_of, neutral_text, remove_image, without_placeholders
from napo_loss.bias.settings import KINDS, BiasSettings

if TYPE_CHECKING:
    from datasets import Dataset


class Answers:
    """``(rows, their indices) -> answers`` with one modality taken away."""

    def __init__(self, model: Any, processor: Any, kind: str, settings: BiasSettings):
        from transformers import GenerationConfig

        self.model, self.processor, self.kind, self.settings = model, processor, kind, settings
        self.omits_image = kind == "question_only" and settings.image_removal == "omit"
        tokenizer = processor.tokenizer
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        eos = [own] if isinstance(own, int) else list(own or [])
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
            eos.append(tokenizer.eos_token_id)
        pad = eos[0] if tokenizer.pad_token_id is None and eos else tokenizer.pad_token_id
        if pad is None:
            raise ValueError("processor.tokenizer has neither pad_token nor eos_token: batches cannot be padded")
        sample = settings.temperature > 0
        # All spelled out: what is left unset, `generate` takes from the checkpoint, which often samples or penalises.
        self.config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=eos or None,
            pad_token_id=pad,
            do_sample=sample,
            temperature=settings.temperature if sample else 1.0,
            top_k=0 if sample else 50,  # 50 is "unset" to a greedy config
            top_p=1.0,
            num_beams=settings.num_beams,
            length_penalty=1.0,
            early_stopping=False,
            repetition_penalty=1.0,
        )

    def __call__(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[str]:
        images = [images_of(row, i) for row, i in zip(rows, indices, strict=True)]
        texts = [self._text(row["prompt"], len(x), i) for row, x, i in zip(rows, images, indices, strict=True)]
        if self.kind == "question_only" and not self.omits_image:
            images = [[self._remove(x, i, n) for n, x in enumerate(xs)] for xs, i in zip(images, indices, strict=True)]
        inputs = self.processor(
            **({} if self.omits_image else {"images": images}),
            text=texts,
            padding=True,
            padding_side="left",  # an answer starts where its prompt ends
            return_tensors="pt",
            add_special_tokens=isinstance(rows[0]["prompt"], str),  # a chat template has written them already
        ).to(self.model.device, getattr(self.model, "dtype", torch.float32))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.settings.temperature > 0:
                torch.manual_seed(int(self._rng(indices[0]).integers(2**62)))
            output = self.model.generate(**inputs, generation_config=self.config)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _text(self, prompt: str | list[dict[str, Any]], n_images: int, index: int) -> str:
        token = getattr(self.processor, "image_token", "<image>")
        keep = {"question": self.kind != "image_only", "image": not self.omits_image}
        if not isinstance(prompt, str):
            messages = conversation(prompt, n_images, self.settings.instruction, **keep)
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            if self.omits_image and token in text:
                raise ValueError(f"prompt {index} holds a placeholder {token!r} that is no image part: {text!r}")
            return text
        if prompt.count(token) != n_images:
            raise ValueError(f"prompt {index} has {prompt.count(token)} placeholders {token!r} for {n_images} images")
        if self.omits_image:
            text = without_placeholders(prompt, token)
            if not text.strip():
                raise ValueError(f"prompt {index} holds nothing beside its images: {prompt!r}")
            return text
        if keep["question"]:
            return prompt
        match = re.search(self.settings.question_pattern, prompt)
        if match is None:
            raise ValueError(f"BiasSettings.question_pattern finds no question in prompt {index}: {prompt!r}")
        start, end = match.span("question")
        return prompt[:start] + neutral_text(match["question"], token, self.settings.instruction) + prompt[end:]

    def _remove(self, image: Any, index: int, number: int) -> Any:
        return remove_image(image, self.settings.image_removal, self._rng(index, number), self.settings.crop_area)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, KINDS.index(self.kind), *key])


def answer_all(dataset: Dataset, answer: Answers, batch_size: int, path: Path | None, run: dict) -> list[str]:
    cache = None if path is None else AnswerCache(path, {"kind": answer.kind, **run}, batch_size, len(dataset))
    if cache is None:
        answers: list[str] = []
        _generate(dataset, answer, batch_size, answers, answers.extend)
    elif len(answers := cache.read()) < len(dataset):
        with cache.writer() as (answers, append):
            _generate(dataset, answer, batch_size, answers, append)
    return answers


def _generate(dataset: Dataset, answer: Answers, batch_size: int, answers: list[str], append: Callable) -> None:
    from tqdm.auto import tqdm

    rows = dataset.select_columns(["prompt", "images" if "images" in dataset.column_names else "image"])
    with tqdm(total=len(dataset), initial=len(answers), desc=answer.kind, unit="answer", leave=False) as bar:
        for start in range(len(answers), len(dataset), batch_size):
            indices = range(start, min(start + batch_size, len(dataset)))
            new = answer([rows[i] for i in indices], indices)
            append(new)
            bar.update(len(new))


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """``eval`` and ``no_grad``; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
