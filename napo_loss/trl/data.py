"""Batches of chosen and K negatives for TRL, made with TRL's own tokenisation and collators."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from trl.data_utils import _tokenize, common_prefix_length, is_conversational
from trl.trainer.utils import global_then_local_main_first

from napo_loss.objective.recipes import RELEASED

RESERVED = ("prompt", "chosen", "margins", "accuracies")
"""Names no negative can have: columns that mean something else, or metrics (``rewards/margins``)."""


def first_row(name: str, dataset: Any) -> Mapping[str, Any]:
    """A row, for its columns; an error that says so where there is none, or where the splits are still together."""
    if isinstance(dataset, Mapping):
        raise TypeError(f"{name} must be one dataset, got a {type(dataset).__name__} of {list(dataset)}: choose one")
    for row in dataset:
        return row
    raise ValueError(f"{name} is empty: it holds no row to train or evaluate on")


def negative_columns(columns: Iterable[str], configured: Mapping[str, Any] | None) -> list[str]:
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


@dataclass
class NegativesCollator:
    """``[chosen; negative 1; …; negative K]`` in one batch, from a TRL collator that makes ``[chosen; rejected]``.

    The 1 + K blocks are dealt out as the two halves of one longer preference batch, in an order that makes TRL's
    output the order wanted. So padding, truncation and images are handled by TRL's code, and with one negative
    the batch is TRL's to the bit. An odd number of blocks gets a copy of the chosen, which is cut off again.

    Args:
        collator: TRL's collator for text (``prompt_ids`` …) or vision (``prompt``, ``images`` …).
        names: columns of the negatives.
        suffix: ``"_ids"`` for tokenised text, ``""`` where the collator tokenises.
        reference: whether the examples hold precomputed reference log-probs, which become ``reference_logps``
            ``[1 + K, B]``. Otherwise columns of such names are somebody else's and are left out.
    """

    collator: Any
    names: list[str]
    suffix: str
    reference: bool = False

    def __post_init__(self):
        if hasattr(self.collator, "processor"):
            blocks = 1 + len(self.names)
            shared = OncePerPrompt(self.collator.processor, copies=blocks + blocks % 2)
            self.collator = replace(self.collator, processor=shared)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        blocks = ["chosen", *self.names]
        odd = len(blocks) % 2
        blocks += ["chosen"] * odd
        half = len(blocks) // 2
        pairs = [
            self._pair(example, first, second)
            for first, second in zip(blocks[:half], blocks[half:], strict=True)
            for example in examples
        ]
        batch = dict(self.collator(pairs))
        if odd:  # every block holds the same images and as many rows, so the last is that share of every tensor
            batch = {key: x[: len(x) * (len(blocks) - 1) // len(blocks)] for key, x in batch.items()}
        if self.reference:
            columns = [reference_column(name) for name in ("chosen", *self.names)]
            batch["reference_logps"] = torch.tensor([[example[c] for example in examples] for c in columns])
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


def tokenize_negatives(
    dataset: Any, names: list[str], processing_class: Any, eos_token: Any, options: dict[str, Any]
) -> Any:
    """Adds ``<name>_ids`` for negatives that TRL, which prepared the dataset, does not know."""
    with global_then_local_main_first():  # as TRL does: one rank fills the cache that the others read
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
    ids = list(_tokenize(processing_class, prompt + negative, **kwargs)["input_ids"])
    start = common_prefix_length(example["prompt_ids"], ids)
    moved = example["prompt_ids"][start:]
    longer = {f"{other}_ids": moved + example[f"{other}_ids"] for other in others}
    return {**longer, "prompt_ids": example["prompt_ids"][:start], f"{name}_ids": ids[start:]}
