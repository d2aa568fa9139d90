"""The CSV of all runs: what is there is not run again."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def done(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], int]:
    """How many rows each run has."""
    found: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = tuple(row[name] if isinstance(row[name], str) else f"{row[name]:g}" for name in KEY)
        found[key] = found.get(key, 0) + 1
    return found


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
    cpu = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in cpu.read_text().splitlines() if "model name" in x] if cpu.exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "python": platform.python_version(), **packages, "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def note_machine(folder: Path, seconds: float) -> None:
    """Every sitting that added runs."""
    path = folder / "machine.json"
    sittings = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*sittings, {**machine(), "seconds": round(seconds)}], indent=1) + "\n")
