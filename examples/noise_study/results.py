"""The CSV of all runs: what is there is not run again."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, cpu_model
from examples.noise_study.training import Run

FOLDER = Path(__file__).parents[1] / "results" / "noise_study"
KEY = ("task", "noise", "rate", "loss", "beta", "learning_rate", "seed")
MEASURED = (
    "epoch", "valid", "test", "q", "margin", "chosen", "fitted_noise", "precision", "q_released", "q_moment",
    "q_moment_of_2", "q_moment_of_8", "q_moment_of_32",
)  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """Rows with numbers as numbers; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    texts = (*KEY[:2], "loss")
    return [{name: x if name in texts else float(x) for name, x in row.items()} for row in rows]


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """That of its run."""
    return tuple(row[name] if isinstance(row[name], str) else f"{row[name]:g}" for name in KEY)


def done(rows: list[dict[str, Any]]) -> Counter[tuple[str, ...]]:
    """How many rows each run has."""
    return Counter(map(key_of, rows))


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """What is whole of a file that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(KEY + MEASURED)
        writer.writerows([_written(row[name]) for name in KEY + MEASURED] for row in rows)
    new.replace(path)


def append(path: Path, run: Run, rows: list[dict[str, Any]]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [*run.key, *(_written(row[name]) for name in MEASURED)] for row in rows
        )


def _written(x: Any) -> str:
    return x if isinstance(x, str) else f"{x:.4g}"


def machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {
        "cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version(), **packages,
        "commit": commit(),
    }  # fmt: skip


def note_machine(folder: Path, seconds: float) -> None:
    """Every sitting that added runs."""
    path = folder / "machine.json"
    sittings = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*sittings, {**machine(), "seconds": round(seconds)}], indent=1) + "\n")
