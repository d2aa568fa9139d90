"""Log-probs of the reference that are kept with the data: a pass over a dataset, and files that a later run finds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from napo_loss.trl.data import NegativesCollator, reference_column
from napo_loss.trl.models import weights_of_reference

FORMAT = 1
"""Of the files: another number, and those of before are not found."""


@dataclass
class ReferencePass:
    """Adds ``ref_<column>_logps`` to a dataset, of the columns that no file beside it holds yet.

    Every rank takes an equal share of consecutive rows, the last ones again where they do not divide, so that what is
    sharded is gathered as often everywhere. All ranks then have all log-probs; the first of them writes the files.

    Args:
        blocks: ``chosen`` and the negatives.
        collator: the trainer's own.
        model: the reference, whose weights are a part of what files are found by.
        own: whether it is the policy, as it starts or without its adapter.
        logps: log-probs ``[N]`` of a batch.
        accelerator: the trainer's.
        workers: processes that collate.
    """

    blocks: list[str]
    collator: NegativesCollator
    model: nn.Module
    own: bool
    logps: Callable[[dict[str, Any]], Tensor]
    accelerator: Any
    workers: int = 0

    def __call__(self, dataset: Any, name: str, batch_size: int) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"precompute_ref_log_probs=True needs a dataset with a length, but the {name} dataset is a "
                f"{type(dataset).__name__}: it is not supported with streams"
            )
        columns = [reference_column(block) for block in self.blocks]
        dataset = dataset.remove_columns([c for c in columns if c in dataset.column_names])  # of another run
        files = self._files(dataset)
        found = self._agreed({block: _load(file, len(dataset)) for block, file in files.items()})
        missing = [block for block in self.blocks if found.get(block) is None]
        if missing:
            computed = self._compute(dataset, name, missing, batch_size)
            found |= {block: computed[:, k] for k, block in enumerate(missing)}
            if self.accelerator.is_main_process:
                for block in missing:
                    _save(files.get(block), found[block])
        for block, column in zip(self.blocks, columns, strict=True):
            dataset = dataset.add_column(column, found[block])  # pyright: ignore[reportCallIssue]
        return dataset

    def _compute(self, dataset: Dataset, name: str, blocks: list[str], batch_size: int) -> np.ndarray:
        """``[rows, blocks]``, float32, on every rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        each = -(-len(dataset) // ranks)
        rows = [min(row, len(dataset) - 1) for row in range(rank * each, (rank + 1) * each)]
        collate = partial(self.collator.collate, blocks=blocks)
        chosen: Any = Subset(dataset, rows)  # pyright: ignore[reportArgumentType]
        loader = DataLoader(chosen, batch_size=batch_size, num_workers=self.workers, collate_fn=collate)
        quiet = not self.accelerator.is_main_process or bool(os.environ.get("TQDM_DISABLE"))
        found = []
        for batch in tqdm(loader, desc=f"Reference log-probs of the {name} dataset", disable=quiet):
            found.append(self.logps(batch).view(len(blocks), -1).t().float().cpu())
        whole = self.accelerator.gather(torch.cat(found).contiguous().to(self.accelerator.device))
        return whole[: len(dataset)].cpu().numpy()

    def _files(self, dataset: Dataset) -> dict[str, Path]:
        """Where each column's log-probs are, or will be: beside a dataset on disk."""
        folder = self._agreed(str(Path(dataset.cache_files[0]["filename"]).parent) if dataset.cache_files else None)
        if folder is None:
            return {}
        files, settings = {}, self._settings()
        for block in self.blocks:
            rows = _tokens(dataset, block) if self.collator.suffix else dataset._fingerprint
            parts = [FORMAT, rows, block, settings, self._as_collated(dataset, block), self._weights]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            files[block] = Path(folder, f"{reference_column(block)}-{key[:32]}.npy")
        return files

    def _settings(self) -> str:
        """What else decides the log-probs: truncation, tokens, precision, the model's own settings."""
        inner = self.collator.collator
        settings = {f.name: repr(getattr(inner, f.name)) for f in dataclasses.fields(inner) if f.name != "processor"}
        settings |= {"max_length": self.collator.max_length, "precision": self.accelerator.mixed_precision}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        model: Any = self.accelerator.unwrap_model(self.model)
        digest.update(model.config.to_json_string().encode())
        if (processor := getattr(inner, "processor", None)) is not None:
            digest.update(json.dumps(sorted(processor.tokenizer.get_vocab().items())).encode())
            digest.update(repr(getattr(processor, "chat_template", None)).encode())
        return digest.hexdigest()

    def _as_collated(self, dataset: Dataset, block: str) -> str:
        """The first rows as the model gets them: whatever a processor does to text and images shows there."""
        batch = self.collator.collate([dataset[row] for row in range(min(2, len(dataset)))], [block])
        digest = hashlib.sha256()
        for key, x in sorted(batch.items()):
            digest.update(key.encode())
            digest.update(_bytes(x) if isinstance(x, Tensor) else repr(x).encode())
        return digest.hexdigest()

    @cached_property
    def _weights(self) -> str:
        """Of all ranks together, each of which may hold a shard."""
        digest = hashlib.sha256()
        weights = weights_of_reference(self.accelerator.unwrap_model(self.model), own=self.own)
        for name, x in sorted(weights.items()):
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            for part in _local(x):
                digest.update(_bytes(part))
        shards = gather_object([digest.hexdigest()]) if self.accelerator.num_processes > 1 else [digest.hexdigest()]
        return hashlib.sha256("".join(shards).encode()).hexdigest()

    def _agreed(self, x: Any) -> Any:
        """What the first rank says."""
        if self.accelerator.num_processes == 1:
            return x
        box = [x]
        broadcast_object_list(box, from_process=0)
        return box[0]


def _tokens(dataset: Dataset, block: str) -> str:
    """Of text, which TRL has tokenised: the fingerprint of such a dataset follows all arguments of the trainer."""
    digest = hashlib.sha256()
    tables: Any = dataset.select_columns(["prompt_ids", f"{block}_ids"]).with_format("arrow").iter(batch_size=1000)
    for table in tables:
        for column in table.columns:
            ids = column.combine_chunks()
            digest.update(np.asarray(ids.value_lengths()).astype(np.int64).tobytes())
            digest.update(np.asarray(ids.flatten()).astype(np.int64).tobytes())
    return digest.hexdigest()


def _local(x: Any) -> Iterator[Tensor]:
    """What this rank holds of a parameter: of a DTensor, and of what ZeRO-3 partitioned."""
    x = getattr(x, "ds_tensor", x)
    yield (x.to_local() if hasattr(x, "to_local") else x).detach()


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _load(file: Path, rows: int) -> np.ndarray | None:
    """The log-probs of a file, or None where there is none, or not a whole one."""
    try:
        found = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows,) else None


def _save(file: Path | None, logps: np.ndarray) -> None:
    """Whole or not at all: a run that is stopped leaves nothing that looks like a result."""
    if file is None:
        return
    half = file.with_name(f"{file.name}.{os.getpid()}.half")
    try:
        with half.open("wb") as stream:
            np.save(stream, logps)
        half.replace(file)
    except OSError as error:
        logging.getLogger(__name__).warning(f"reference log-probs are not kept for another run: {error}")
