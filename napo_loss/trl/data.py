"""Batches of chosen and K negatives for TRL, made with TRL's own tokenisation and collators."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from napo_loss.objective.recipes import RELEASED
from napo_loss.types import Record

RESERVED = ("prompt", "chosen", "margins", "accuracies")
"""Names no negative can have: columns that mean something else, or metrics (``rewards/margins``)."""


def first_row(name: str, dataset: Any) -> Mapping[str, Any]:
    """A row, for its columns; an error that says so where there is none, or where the splits are still together."""
    if isinstance(dataset, Mapping):
        raise TypeError(f"{name} must be one dataset, got a {type(dataset).__name__} of {list(dataset)}: choose one")
    for row in dataset:
        return row
    raise ValueError(f"{name} is empty: it holds no row to train or evaluate on")


def first_rows(train_dataset: Any, eval_dataset: Any) -> dict[str, Mapping[str, Any]]:
    """A row of each dataset that a trainer is given, by the name it has for its user."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required")
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{split!r}]": dataset for split, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        named["eval_dataset"] = eval_dataset
    return {name: first_row(name, dataset) for name, dataset in named.items()}


def negative_columns(columns: Iterable[str], configured: Iterable[str] | None) -> list[str]:
    """The negatives to train on: those configured, or ``rejected`` and the paper's columns that are there."""
    columns = list(columns)
    names = [name for name in RELEASED.named if name in columns or name == "rejected"]
    if configured is not None:
        names = list(configured)
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(f"no negative can be called {taken[0]!r}: {', '.join(RESERVED)} mean something else")
    for name in ("chosen", "rejected", *names):  # TRL prepares `rejected` whether it is trained on or not
        if name not in columns:
            raise ValueError(f"the dataset lacks the column {name!r}: it has {columns}, the negatives are {names}")
    return names


@dataclass(eq=False)
class ReferenceLogps(Record, tensors=("logps",)):
    """Log-probs of the reference for every row of a batch, ``[N]``, on their way through the trainer.

    A record and no tensor: under DeepSpeed transformers casts tensors of a batch to the dtype of the model, and half
    precision costs log-probs of whole sequences whole nats.
    """

    logps: Tensor


@dataclass
class NegativesCollator:
    """``[chosen; negative 1; …; negative K]`` in one batch, from a TRL collator that makes ``[chosen; rejected]``.

    The 1 + K blocks are dealt out as the two halves of one longer preference batch, in an order that makes TRL's
    output the order wanted. So padding, truncation and images are handled by TRL's code, and with one negative
    the batch is TRL's to the bit. An odd number of blocks gets a copy of the first, which is cut off again.

    Args:
        collator: TRL's collator for text (``prompt_ids`` …) or vision (``prompt``, ``images`` …).
        names: columns of the negatives.
        suffix: ``"_ids"`` for tokenised text, ``""`` where the collator tokenises.
        reference: whether the examples hold the reference's log-probs, which become ``reference_logps``, a
            :class:`ReferenceLogps`. Otherwise columns of such names are somebody else's and are left out.
        max_length, truncation_mode: cut sequences off where the collator, of TRL before 1.9, does not.
    """

    collator: Any
    names: list[str]
    suffix: str
    reference: bool = False
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self):
        self.cuts = self.max_length is not None and not hasattr(self.collator, "max_length")
        if self.cuts and self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} needs a TRL whose collators cut sequences off, from 1.9 on"
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        blocks = ["chosen", *self.names]
        batch = self.collate(examples, blocks)
        if self.reference:
            columns = [example[reference_column(name)] for name in blocks for example in examples]
            batch["reference_logps"] = ReferenceLogps(torch.tensor(columns, dtype=torch.float32))
        return batch

    def collate(self, examples: list[dict[str, Any]], blocks: list[str]) -> dict[str, Any]:
        """A batch of these columns, one block of rows for each."""
        dealt = blocks + blocks[: len(blocks) % 2]
        half = len(dealt) // 2
        pairs = [
            self._pair(example, first, second)
            for first, second in zip(dealt[:half], dealt[half:], strict=True)
            for example in examples
        ]
        collator = self.collator
        if hasattr(collator, "processor"):
            collator = replace(collator, processor=OncePerPrompt(collator.processor, copies=len(dealt)))
        batch = dict(collator(pairs))
        # Every block holds the same images and as many rows, so the last is that share of every tensor.
        batch = {key: x[: len(x) * len(blocks) // len(dealt)] for key, x in batch.items()}
        if self.cuts:
            sides = {"input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids"}
            batch = {key: x[:, : self.max_length] if key in sides else x for key, x in batch.items()}
        return batch

    def _pair(self, example: dict[str, Any], first: str, second: str) -> dict[str, Any]:
        sides = {side + self.suffix for side in ("chosen", "rejected", *self.names)}
        if missing := [side for side in (first + self.suffix, second + self.suffix) if side not in example]:
            raise ValueError(f"a batch lacks {missing}: it has {list(example)}")
        shared = {k: v for k, v in example.items() if k not in sides and not k.startswith("ref_")}
        chosen, rejected = example[first + self.suffix], example[second + self.suffix]
        return {**shared, f"chosen{self.suffix}": chosen, f"rejected{self.suffix}": rejected}


@dataclass
class OncePerPrompt:
    """A processor that prepares a prompt and its images once, where TRL's collator asks for every block anew.

    Preparing images costs more than the rest of a batch, and the blocks share them. Every output has its rows first
    (images, patches, sequences), so a copy of all rows per block is what the processor itself would have returned.
    """

    processor: Any
    copies: int

    def __call__(self, **inputs: Any) -> Any:
        text, images = inputs["text"], inputs.get("images")
        B = len(text) // self.copies
        if images is None or text != text[:B] * self.copies:  # a template may render a prompt by its completion
            return self.processor(**inputs)
        batch = self.processor(**{**inputs, "text": text[:B], "images": images[:B]})
        for key, x in list(batch.items()):
            batch[key] = torch.cat([x] * self.copies) if isinstance(x, torch.Tensor) else x * self.copies
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these before there is a processor
            raise AttributeError(name)
        return getattr(self.processor, name)


def reference_column(name: str) -> str:
    """Where the precomputed reference log-probs of a column are kept; TRL's names for chosen and rejected."""
    return f"ref_{name}_logps"


def tokenize_negatives(dataset: Any, names: list[str], processing_class: Any, options: dict[str, Any]) -> Any:
    """Adds ``<name>_ids`` for negatives that TRL, which prepared the dataset, does not know."""
    eos_token = getattr(processing_class, "tokenizer", processing_class).eos_token
    for i, name in enumerate(names):
        kwargs = {"others": ["chosen", "rejected", *names[:i]], "processing_class": processing_class}
        kwargs |= {"name": name, "eos_token": eos_token}
        dataset = dataset.map(tokenize_negative, fn_kwargs=kwargs, **options)
    return dataset


def tokenize_negative(
    example: dict[str, Any], name: str, others: list[str], processing_class: Any, eos_token: str
) -> dict[str, Any]:
    """``<name>_ids`` beside the ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` that TRL made.

    The completion begins where the tokenised prompt and prompt + completion diverge. Should that be earlier than
    was found for the ``others``, the prompt is cut there for them too: all negatives share one prompt.
    """
    prompt, negative = example["prompt"], example[name]
    tools = example.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }
    if not is_conversational({"prompt": prompt}):
        kwargs = {}
        negative += "" if negative.endswith(eos_token) else eos_token
    ids = tokens_of(processing_class, prompt + negative, kwargs)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(example["prompt_ids"], ids, strict=False))
    start = sum(1 for _ in shared)
    moved = example["prompt_ids"][start:]
    longer = {f"{other}_ids": moved + example[f"{other}_ids"] for other in others}
    return {**longer, "prompt_ids": example["prompt_ids"][:start], f"{name}_ids": ids[start:]}


def tokens_of(processing_class: Any, text: str | list, options: dict[str, Any]) -> list[int]:
    """The tokens of a text, or of a conversation as its template renders it."""
    is_processor = isinstance(processing_class, ProcessorMixin)
    if isinstance(text, str):
        ids = processing_class(text=text)["input_ids"]
    else:
        messages = prepare_multimodal_messages(text, images=[]) if is_processor else text
        options = {**options, "tokenize": True, "return_dict": True}
        ids = processing_class.apply_chat_template(messages, **options)["input_ids"]
    return list(ids[0] if is_processor else ids)  # a processor makes a batch of one
