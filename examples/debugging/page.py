"""The CSV of the runs, and what docs/debugging.md shows of it: a figure, a table, rules that tell the runs apart."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import commit, cpu_model
from benchmarks.report import header, line
from benchmarks.suite import paste
from examples.debugging.runs import BATCH, EVALUATED, LOGGED, NAMES, WAYS

FOLDER = Path(__file__).parents[1] / "results" / "debugging"
PAGE = Path(__file__).parents[2] / "docs" / "debugging.md"
COLUMNS = ("run", "seed", "step", "epoch", *LOGGED, *EVALUATED)
Rows = list[dict[str, Any]]

LAST = 0.25  # of a run: over which its end is averaged
NOISY_Q, LEARNED_Q = 0.4, 0.3
"""Of a moment estimate: more is noise, less is not."""
UNSEEN_Q = 0.3  # by how much q of held-out pairs is above that of training where these are memorised
FALL = 20.0  # nats by which the chosen are less likely than at the start where training diverges


def write_rows(folder: Path, rows: Rows, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    made = {"cpu": cpu_model(), "python": platform.python_version(), **packages}
    made |= {"commit": commit(), "seconds": round(seconds)}
    (folder / "machine.json").write_text(json.dumps(made, indent=1) + "\n")


def read(folder: Path) -> Rows:
    with (folder / "runs.csv").open(newline="") as file:
        return [
            {name: x if name == "run" else float(x) if x else float("nan") for name, x in row.items()}
            for row in csv.DictReader(file)
        ]


def of(rows: Rows, name: str, seed: float | None = None) -> Rows:
    return [row for row in rows if row["run"] == name and seed in (None, row["seed"])]


def seeds(rows: Rows) -> list[float]:
    return sorted({row["seed"] for row in rows})


def logged(rows: Rows, key: str) -> list[float]:
    """Of the rows that have it: evaluation is logged less often."""
    return [row[key] for row in rows if not np.isnan(row[key])]


def end(rows: Rows, key: str) -> float:
    last = max(row["step"] for row in rows)
    return float(np.mean(logged([row for row in rows if row["step"] > (1 - LAST) * last], key)))


def start(rows: Rows, key: str) -> float:
    """The first value that was logged."""
    return logged(rows, key)[0]


def diagnose(rows: Rows) -> str:
    """Which way one run went, from what it logged: the rules of the page's table, in their order."""
    q, unseen = end(rows, "napo/q/rejected"), end(rows, "eval_napo/q/rejected")
    if end(rows, "logps/chosen") < start(rows, "logps/chosen") - FALL:
        return "diverging"
    if q > NOISY_Q:
        return "noisy"
    if unseen > q + UNSEEN_Q:
        return "memorising"
    return "healthy" if q < LEARNED_Q else "between"


def numbers(rows: Rows) -> str:
    """The end of each run, mean over seeds with the smallest and the largest; the chosen at the start, too."""
    keys: dict[str, Callable[[Rows], float]] = {"`logps/chosen`, first": lambda x: start(x, "logps/chosen")}
    for key in ("logps/chosen", *(k for k in (*LOGGED, *EVALUATED) if k.partition("/")[2].endswith(NAMES))):
        keys[f"`{key}`"] = lambda x, key=key: end(x, key)
    body = []
    for title, value in keys.items():
        cells = []
        for name in WAYS:
            found = [value(of(rows, name, seed)) for seed in seeds(rows)]
            cells.append(f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})".replace("-", "−"))
        body.append(line(title, cells))
    return "\n".join([*header(f"mean of the last {100 * LAST:.0f} % of steps", [*WAYS]), *body])


def made(folder: Path, rows: Rows) -> str:
    x, steps = json.loads((folder / "machine.json").read_text()), max(row["step"] for row in rows)
    seed = seeds(rows)
    return (
        f"{len(WAYS)} runs for each of the seeds {seed[0]:.0f} to {seed[-1]:.0f}, {steps:.0f} steps of {BATCH} pairs, "
        f"{x['seconds']} s of one core of an {x['cpu']}; torch {x['torch']}, transformers {x['transformers']}, "
        f"TRL {x['trl']}; commit {x['commit']}."
    )


PANELS = (
    ("margin of the rewards", ("rewards/margins/rejected", "eval_rewards/margins/rejected"), None),
    ("q", ("napo/q/rejected", "eval_napo/q/rejected", "napo/q/question_only"), (-0.03, 1.05)),
    ("weight", ("napo/weight/rejected", "napo/weight/question_only"), (-0.03, 1.05)),
    ("log-prob of the chosen, nats", ("logps/chosen",), None),
)
COLOURS = {
    "rewards/margins/rejected": "#4c78a8", "eval_rewards/margins/rejected": "#e4572e", "napo/q/rejected": "#4c78a8",
    "eval_napo/q/rejected": "#e4572e", "napo/q/question_only": "#8a8a8a", "napo/weight/rejected": "#4c78a8",
    "napo/weight/question_only": "#8a8a8a", "logps/chosen": "#4c78a8",
}  # fmt: skip


def draw(rows: Rows, path: Path, made: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(PANELS), len(WAYS), figsize=(13, 9), sharex=True, layout="constrained")
    for column, (name, way) in zip(axes.T, WAYS.items(), strict=True):
        for ax, (ylabel, keys, limits) in zip(column, PANELS, strict=True):
            for key in keys:
                for seed in seeds(rows):
                    mine = [row for row in of(rows, name, seed) if not np.isnan(row[key])]
                    style: dict[str, Any] = {"color": COLOURS[key], "lw": 1.2, "ms": 3}
                    style["marker"] = "o" if key in EVALUATED else None
                    style["label"] = key if seed == seeds(rows)[0] else None
                    ax.plot([row["step"] for row in mine], [row[key] for row in mine], **style)
            ax.grid(axis="y", color="#e6e6e6", lw=0.7)
            if limits:
                ax.set_ylim(*limits)
            if name == next(iter(WAYS)):
                ax.set_ylabel(ylabel)
                ax.legend(fontsize=7, frameon=False)
        passes = of(rows, name)[-1]["epoch"]
        column[0].set_title(
            f"{name}: {100 * way.swapped:.0f} % swapped,\n"
            f"{way.pairs} pairs, {passes:.2g} epochs, learning rate {way.learning_rate:g}", fontsize=9, loc="left",
        )  # fmt: skip
        column[-1].set_xlabel("step")
        column[0].axhline(0, color="#999999", lw=0.7)
    title = "What NaPOTrainer logs, a line for each seed; held-out pairs (eval_) have the same noise."
    figure.suptitle(f"{title}\n{made}", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(folder: Path) -> None:
    rows = read(folder)
    tables = {"numbers": numbers(rows), "made": made(folder, rows)}
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n")
        if folder == FOLDER:
            paste(PAGE, folder / f"{name}.md", text)
    draw(rows, folder / "figure.png", tables["made"])
    print("\n\n".join(tables.values()))
    for name in WAYS:
        print(name, "reads as", [diagnose(of(rows, name, seed)) for seed in seeds(rows)])
