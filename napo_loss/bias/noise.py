"""How many of the biased negatives are in fact right, as far as comparing texts can tell."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from napo_loss.bias.settings import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

Match = Literal["exact", "f1"]
PUNCTUATION = str.maketrans("", "", string.punctuation)


def natural_noise(
    dataset: Dataset, kinds: Sequence[str] = KINDS, *, match: Match = "exact", threshold: float = 0.8
) -> dict[str, float]:
    """Share of negatives per column which are in fact right, taken to be those that agree with ``chosen``.

    Exact: the same text but for case, white space and closing punctuation. A right answer in other words is not
    seen, so where ``chosen`` is right this is a lower bound.

    F1: :func:`token_f1` of at least ``threshold``, for answers too long ever to be equal. Never below the exact share,
    but itself **no bound**: a right answer in other words is still missed, and a copy that is wrong in one word, or
    in the order of its words, is counted. It rises as the threshold falls; report the threshold with it.

    Args:
        dataset: columns ``chosen`` and some of ``kinds``: strings, or conversations, whose contents are joined.
        kinds: columns to compare; those that the dataset lacks are left out.
        match: ``"exact"`` or ``"f1"``.
        threshold: smallest F1 that counts as agreement, in (0, 1]. Not used by ``"exact"``.

    Returns:
        Column to share, in [0, 1]; 0 for a dataset without rows.

    Raises:
        ValueError: without ``chosen`` or any of ``kinds``, for another ``match``, a threshold outside of (0, 1].

    Example:
        >>> from datasets import Dataset
        >>> natural_noise(Dataset.from_dict({"chosen": ["A bear.", "Two."], "question_only": ["a  bear", "One."]}))
        {'question_only': 0.5}
        >>> long = {"chosen": ["A bear sits on the old red sofa."], "image_only": ["A bear sits on a red sofa."]}
        >>> natural_noise(Dataset.from_dict(long), match="f1")
        {'image_only': 1.0}
    """
    if match not in get_args(Match):
        raise ValueError(f"match must be one of {get_args(Match)}, got {match!r}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}")
    present = [kind for kind in kinds if kind in dataset.column_names]
    if not present or "chosen" not in dataset.column_names:
        raise ValueError(f"dataset needs 'chosen' and one of kinds = {list(kinds)}, got {dataset.column_names}")
    chosen = [text_of(x) for x in dataset["chosen"]]
    agree = equal if match == "exact" else lambda a, b: token_f1(a, b) >= threshold
    return {
        kind: sum(agree(a, text_of(b)) for a, b in zip(chosen, dataset[kind], strict=True)) / max(len(chosen), 1)
        for kind in present
    }


def token_f1(answer: str, other: str) -> float:
    """F1 of two answers as bags of tokens: ``2·P·R / (P + R) = 2·|a ∩ b| / (|a| + |b|)``, in [0, 1], symmetric.

    As SQuAD's evaluation script defines it (Rajpurkar et al. 2016, and 2018 for empty answers, which agree with each
    other alone): lower case, without ASCII punctuation and the English articles, split at white space. So a text in
    a script without spaces is one token.

    Example:
        >>> token_f1("The bear is red.", "a red bear")
        0.8
        >>> token_f1("a man bites a dog", "the dog bites the man")
        1.0
    """
    a, b = Counter(tokens(answer)), Counter(tokens(other))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def tokens(answer: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", answer.casefold().translate(PUNCTUATION)).split()


def equal(answer: str, other: str) -> bool:
    a, b = (" ".join(x.casefold().split()).rstrip(".!?") for x in (answer, other))
    return a == b


def text_of(answer: Any) -> str:
    """The words of an answer, be it a string or a conversation."""
    if isinstance(answer, str):
        return answer
    contents = [m["content"] for m in answer]
    return " ".join(c if isinstance(c, str) else " ".join(p.get("text") or "" for p in c) for c in contents)
