"""Answers on disk, and the fingerprint that keeps two runs of :mod:`napo_loss.bias` apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def resume(cache: Path, run: dict, batch_size: int, total: int) -> list[str]:
    """The answers already on disk. A torn last line is cut off, and with sampling its whole batch."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = cache.read_bytes().splitlines(keepends=True) if cache.exists() else []
    lines = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
    if lines and (found := json.loads(lines[0])) != run:
        differing = sorted(k for k in {*found, *run} if found.get(k) != run.get(k))
        raise ValueError(f"cache_dir holds {cache.name} of another run, which differs in {differing}: use a new folder")
    done = len(lines) - 1
    if run["temperature"] > 0 and done < total:  # one seed per batch: batches start where they would have
        done -= done % batch_size
    lines = lines[: 1 + done]
    with cache.open("ab") as file:  # cut rather than written anew: a second interruption must not lose the first part
        file.truncate(sum(map(len, lines)))
        if not lines:
            file.write(json.dumps(run).encode() + b"\n")
    return [json.loads(line) for line in lines[1:]]


def dataset_digest(dataset: Dataset) -> str:
    """Of the prompts and of the images as they are stored, so that it survives a new process."""
    stored = dataset.select_columns([c for c in ("prompt", "images", "image") if c in dataset.column_names])
    digest = hashlib.sha256()
    for batch in stored.with_format("arrow").iter(batch_size=256):
        table: Any = batch
        digest.update(repr(table.to_pylist()).encode())
    return digest.hexdigest()[:16]


def model_digest(model: Any) -> str:
    """Of a few elements of every parameter: enough to tell checkpoints apart, and the same on every device."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // 16)]
        digest.update(f"{name} {list(p.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]
