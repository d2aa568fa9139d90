"""Means and spread over seeds: the table, and the figure."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLUMNS = {
    "conflict": "person's favourite\n≠ picture",
    "next": "usual question\n≠ this question",
    "aligned": "person's favourite\n= picture",
    "this": "usual question\n= this question",
    "overall": "all questions",
    "same without image": "same answer\nwithout image",
    "same without question": "same answer\nwithout question",
}
"""What the table shows, in percent: accuracies where a bias is wrong, and right; and how far the answers rest on it."""
DIFFERENCES = ["NaPO minus DPO", "NaPO minus DPO, all negatives", "the same, equal weights"]
COLOURS = ["#8c8c8c", "#4c78a8", "#e4572e", "#9ecae9", "#f5b08c"]
Q_COLOURS = {"question_only": "#b279a2", "image_only": "#54a24b"}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(mean(values), 4), "std": round(stdev(values), 4) if len(values) > 1 else 0.0}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Per model and column; and each arm against DPO of the same seed, which the spread of the models does not blur."""
    ends = {"pre-trained": [seed["pre-trained"] for seed in seeds]}
    ends |= {arm: [seed["arms"][arm]["curve"][-1] for seed in seeds] for arm in seeds[0]["arms"]}
    columns = list(seeds[0]["pre-trained"])

    def against(arm: str, other: str) -> dict[str, Any]:
        differences = {c: [a[c] - b[c] for a, b in zip(ends[arm], ends[other], strict=True)] for c in columns}
        return {c: {**spread(x), "better seeds": sum(d > 0 for d in x)} for c, x in differences.items()}

    kinds = seeds[0]["pairs"]["in fact right"]
    lessons = {arm: [seed["arms"][arm]["wrong lessons"] for seed in seeds] for arm in seeds[0]["arms"]}
    return {
        "final": {arm: {c: spread([e[c] for e in end]) for c in columns} for arm, end in ends.items()},
        "NaPO minus DPO": against("NaPO", "DPO"),
        "NaPO minus DPO, all negatives": against("NaPO", "DPO, all negatives"),
        "the same, equal weights": against("NaPO, equal weights", "DPO, all negatives, equal weights"),
        "negatives in fact right": {k: spread([s["pairs"]["in fact right"][k] for s in seeds]) for k in kinds},
        "share of the gradient that teaches the wrong answer": {
            arm: {"first step": spread([x[0] for x in shares]), "last step": spread([x[1] for x in shares])}
            for arm, shares in lessons.items()
        },
        "pairs flipped": spread([s["pairs"]["flipped"] for s in seeds]),
    }


def table(report: dict[str, Any]) -> str:
    result, n = report["summary"], len(report["seeds"])

    def cell(x: dict[str, float], sign: str = "") -> str:
        return f"{100 * x['mean']:{sign}.1f} ± {100 * x['std']:.1f}"

    heads = [title.split("\n") for title in COLUMNS.values()]
    heads = [["", *h] if len(h) == 1 else h for h in heads]
    rows = [["", *(h[0] for h in heads)], ["%", *(h[1] for h in heads)]]
    rows += [[arm, *(cell(x[c]) for c in COLUMNS)] for arm, x in result["final"].items()]
    rows += [[name, *(cell(result[name][c], "+") for c in COLUMNS)] for name in DIFFERENCES]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(r[1:], widths[1:], strict=True))]) for r in rows
    ]
    rule = "-" * len(lines[0])
    lines[2:2] = [rule]
    lines[-len(DIFFERENCES) : -len(DIFFERENCES)] = [rule]
    noise = ", ".join(f"{k} {100 * x['mean']:.0f} %" for k, x in result["negatives in fact right"].items())
    shares = result["share of the gradient that teaches the wrong answer"]
    lessons = "; ".join(
        f"{arm} {100 * x['first step']['mean']:.0f} to {cell(x['last step'])} %" for arm, x in shares.items()
    )
    flipped = 100 * result["pairs flipped"]["mean"]
    wins = "; ".join(
        f"{name}: " + ", ".join(f"{result[name][c]['better seeds']}/{n} {c}" for c in ("conflict", "next", "overall"))
        for name in DIFFERENCES
    )
    return "\n".join([
        f"Held-out test pictures, mean ± standard deviation over {n} seeds (differences: paired by seed).",
        "", *lines, "",
        f"Noise in the pairs: {flipped:.0f} % flipped; biased answers in fact right: {noise}.",
        f"Share of the gradient that teaches the wrong answer, first to last step: {lessons}.",
        f"Seeds with a positive difference: {wins}.",
    ])  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/demo.md: ends, and differences paired by seed."""
    result, n = report["summary"], len(report["seeds"])
    lines = [
        f"| %, {n} seeds, mean ± standard deviation | "
        + " | ".join(x.replace("\n", " ") for x in COLUMNS.values())
        + " |",
        "|---" + "|---:" * len(COLUMNS) + "|",
    ]
    rows = {**result["final"], **{f"*{name}*": result[name] for name in DIFFERENCES}}
    for name, row in rows.items():
        sign = "+" if name.startswith("*") else ""
        cells = [f"{100 * row[c]['mean']:{sign}.1f} ± {100 * row[c]['std']:.1f}" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(report: dict[str, Any], path: Path) -> None:
    seeds, arms = report["seeds"], list(report["arms"])
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    panels = {
        "conflict": "Accuracy where the language prior\nis wrong, %",
        "overall": "Accuracy, all questions, %",
        "same without image": "Answers unchanged\nwithout the image, %",
    }
    for ax, (column, title) in zip(axes, panels.items(), strict=False):
        for arm, colour in zip(arms, COLOURS, strict=True):
            curves = [seed["arms"][arm]["curve"] for seed in seeds]
            band(ax, curves, column, arm, colour, scale=100)
        ax.set_title(title, loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(arms))
    for kind, colour in Q_COLOURS.items():
        band(axes[3], [seed["arms"]["NaPO"]["q"] for seed in seeds], kind, kind, colour)
    axes[3].axhline(0, color=COLOURS[0], lw=1.5)
    axes[3].text(axes[3].get_xlim()[1], 0.02, "DPO", color=COLOURS[0], ha="right", va="bottom")
    axes[3].set_title("q of NaPO: 1 is most robust, 0 is DPO", loc="left")
    axes[3].set_ylim(-0.03, 1.05)
    axes[3].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.08))
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(axis="y", color="#e6e6e6", lw=0.7)
        ax.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def band(ax: Any, curves: list[list[dict]], column: str, label: str, colour: str, scale: float = 1) -> None:
    """Mean over seeds, with one standard deviation to each side."""
    steps = [point["step"] for point in curves[0]]
    values = scale * np.array([[point[column] for point in curve] for curve in curves])
    centre, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    ax.plot(steps, centre, color=colour, label=label, lw=1.8, marker="o" if len(steps) < 10 else None, ms=3.5)
    ax.fill_between(steps, centre - width, centre + width, color=colour, alpha=0.15, lw=0)
