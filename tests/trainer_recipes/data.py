"""The tiny model and the pairs that every trainer gets."""

import json
from pathlib import Path

import tiny

WORDS = tiny.WORDS.split()[4:]


def rows(n: int = 16) -> list[dict[str, str]]:
    """No two alike, of several lengths: two ranks see other pairs. Chosen words are never rejected, so margins grow."""
    halves = {"prompt": WORDS, "chosen": WORDS[:8], "rejected": WORDS[8:], "other": WORDS[10:]}

    def text(i: int, k: int, words: list[str]) -> str:
        return "".join(f" {words[(3 * i + 5 * k + j) % len(words)]}" for j in range(1 + (i + 2 * k) % 4))

    return [{name: text(i, k, words) for k, (name, words) in enumerate(halves.items())} for i in range(n)]


def saved(folder: Path) -> Path:
    """The model and its tokenizer as a checkpoint, for trainers that want a path."""
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def write_json(path: Path, found: list) -> Path:
    path.write_text(json.dumps(found))
    return path
