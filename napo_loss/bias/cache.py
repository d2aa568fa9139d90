"""Answers on disk, and the fingerprint that keeps two runs of :mod:`napo_loss.bias` apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class AnswerCache:
    """A file of JSON lines: the run, then ``[row, answer]`` in the order of the rows. One process writes it at a time.

    Every line is checked as it is read, for an answer in another's row would be trained on and never seen. Only the
    last may be torn, where a run was killed; it is generated again.
    """

    def __init__(self, path: Path, run: dict[str, Any], batch_size: int, total: int):
        self.path, self.run, self.total = path, run, total
        self.whole = batch_size if run["temperature"] > 0 else 1  # sampled with one seed per batch, which starts anew

    def read(self) -> list[str]:
        """The answers that are there, of whole batches where they were sampled; a complete file is only read."""
        return self._lines()[1]

    @contextmanager
    def writer(self) -> Iterator[tuple[list[str], Callable[[Sequence[str]], None]]]:
        """The answers so far, and what appends more of them; an error where another process writes."""
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(f"{self.path}.lock", timeout=0).acquire()
        except Timeout as error:
            raise RuntimeError(f"cache_dir: another process is writing {self.path}") from error
        with lock:
            size, answers = self._lines()
            # Cut, not written anew: a second kill must not lose the first part. Without a buffer, which would be
            # written again, and fail again, when the file is closed.
            with self.path.open("ab", buffering=0) as file:
                file.truncate(size)
                if size == 0:
                    self._write(file, [self.run], answers)

                def append(new: Sequence[str]) -> None:
                    self._write(file, [[len(answers) + i, a] for i, a in enumerate(new)], answers)
                    answers.extend(new)

                yield answers, append

    def _write(self, file: FileIO, lines: list[Any], answers: list[str]) -> None:
        left = memoryview(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            told = f"{error.strerror}: the {len(answers)} answers so far are kept"
            raise OSError(error.errno, told, str(self.path)) from error

    def _lines(self) -> tuple[int, list[str]]:
        """Bytes of the lines that stay, and the answers in them."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            return 0, []
        parsed = [self._parse(number, line) for number, line in enumerate(lines)]
        found = parsed[0]
        if found != self.run:
            if not isinstance(found, dict):
                raise ValueError(f"cache_dir: line 1 of {self.path} describes no run: use a new folder")
            differing = sorted(k for k in {*found, *self.run} if found.get(k) != self.run.get(k))
            raise ValueError(
                f"cache_dir holds {self.path.name} of another run, which differs in {differing}: use a new folder"
            )
        for number, entry in enumerate(parsed[1:]):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)) or entry[0] != number:
                raise ValueError(
                    f"cache_dir: line {number + 2} of {self.path} must be [{number}, answer], got {str(entry)[:60]!r}: "
                    "cut the file off before it to continue from there, or use a new folder"
                )
        if len(parsed) - 1 > self.total:
            raise ValueError(
                f"cache_dir: {self.path} has {len(parsed) - 1} answers for {self.total} rows: use a new folder"
            )
        done = len(parsed) - 1
        if done < self.total:
            done -= done % self.whole
        return sum(map(len, lines[: 1 + done])), [answer for _, answer in parsed[1 : 1 + done]]

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"cache_dir: line {number + 1} of {self.path} is no JSON: cut the file off before it to continue from "
                "there, or use a new folder"
            ) from error


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
