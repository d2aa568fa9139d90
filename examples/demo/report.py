"""One small table and one figure: every arm beside DPO of the same seed, so that the spread of models cancels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report import header, line
from benchmarks.suite import paste
from examples.demo.arms import FOLDER
from examples.demo.training import Arm, Scale
from examples.noise_study.findings import Estimate, estimate

PAGE = Path(__file__).parents[2] / "docs" / "demo.md"
COLUMNS = {
    "prior wrong": "right where the prior is wrong",
    "overall": "right, all questions",
    "same without image": "same answer without the image",
}
BASE, BEFORE = "DPO", "pre-trained"
PLAIN, OURS = "three negatives, q = 0", "SCALE_FREE"
"""The same negatives and weights without and with noise awareness."""
COLOURS = {0.0: "#4c78a8", 0.3: "#e4572e"}
TITLES = {
    "prior wrong": "Right where the prior is wrong:\npoints more than DPO",
    "overall": "Right, all questions:\npoints more than DPO",
    "same without image": "Same answer without the image:\npoints more than DPO (less is better)",
}


class Report(NamedTuple):
    scale: Scale
    arms: list[Arm]
    seeds: list[dict[str, Any]]  # what `run_seed` found
    seconds: float
    machine: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Report:
        x = json.loads(path.read_text())
        scale = Scale(**{**x["scale"], "swapped": tuple(x["scale"]["swapped"])})
        return cls(scale, [Arm(**arm) for arm in x["arms"]], x["seeds"], x["seconds"], x["machine"])

    def mean(self, column: str, rate: float, arm: str) -> Estimate:
        return estimate(self._values(column, rate, arm))

    def difference(self, column: str, rate: float, arm: str, other: str = BASE) -> Estimate:
        """To another arm, paired by seed."""
        pairs = zip(self._values(column, rate, arm), self._values(column, rate, other), strict=True)
        return estimate(a - b for a, b in pairs)

    def _values(self, column: str, rate: float, arm: str) -> list[float]:
        ends = (s[BEFORE] if arm == BEFORE else s["arms"][arm][f"{rate:g}"]["end"] for s in self.seeds)
        return [end[column] for end in ends]


def write(folder: Path, report: Report) -> None:
    """Numbers first; table and figure are of what the file holds."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "scale": asdict(report.scale), "arms": [asdict(arm) for arm in report.arms], "seconds": round(report.seconds),
        "machine": report.machine, "seeds": rounded(report.seeds),
    }  # fmt: skip
    (folder / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    report = Report.read(folder / "demo.json")
    text = f"{markdown(report)}\n\n{made(report)}"
    (folder / "demo.md").write_text(text + "\n")
    figure(report, folder / "demo.png")
    if folder.resolve() == FOLDER.resolve():
        paste(PAGE, FOLDER / "demo.md", text)
    print(f"\n{text}\n\nWritten: demo.json, demo.md and demo.png in {folder}")


def markdown(report: Report) -> str:
    n = len(report.seeds)
    lines = header(f"%, {n} seeds (minus DPO, paired, 95 % interval)", list(COLUMNS.values()))
    lines.append(line("before preferences", [f"{100 * report.mean(c, 0, BEFORE).mean:.1f}" for c in COLUMNS]))
    for rate in report.scale.swapped:
        for arm in report.arms:
            name = f"{100 * rate:.0f} % swapped: {arm.name}"
            lines.append(line(name, [cell(report, column, rate, arm.name) for column in COLUMNS]))
    for rate in report.scale.swapped:
        name = f"{100 * rate:.0f} % swapped: *{OURS} minus {PLAIN}*"
        lines.append(line(name, [report.difference(column, rate, OURS, PLAIN).signed for column in COLUMNS]))
    return "\n".join(lines)


def cell(report: Report, column: str, rate: float, arm: str) -> str:
    mean = f"{100 * report.mean(column, rate, arm).mean:.1f}"
    return mean if arm == BASE else f"{mean} ({report.difference(column, rate, arm).signed})"


def made(report: Report) -> str:
    x, right = report.machine, report.seeds[0]["in fact right"]
    shares = ", ".join(
        f"{100 * estimate(seed['in fact right'][name] for seed in report.seeds).mean:.0f} % of `{name}`"
        for name in right
    )
    return (
        f"Biased answers that are in fact right: {shares}. Seeds 0 to {len(report.seeds) - 1}, test questions, "
        f"{report.seconds:.0f} s on {x['cores']} cores of an {x['cpu']}; torch {x['torch']}; commit {x['commit']}."
    )


def figure(report: Report, path: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained", width_ratios=(1, 1, 1, 1.1))
    others = [arm.name for arm in report.arms if arm.name != BASE]
    for ax, (column, title) in zip(axes, TITLES.items(), strict=False):
        for rate in report.scale.swapped:
            found = [report.difference(column, rate, arm) for arm in others]
            shift = 0.13 if rate else -0.13
            ax.errorbar(
                [100 * x.mean for x in found], [i + shift for i in range(len(found))],
                xerr=[100 * x.half_width for x in found], fmt="o", color=COLOURS[rate], ms=4.5,
                label=f"{100 * rate:.0f} % of the pairs swapped",
            )  # fmt: skip
        ax.axvline(0, color="#8c8c8c", lw=1)
        ax.set_title(title, loc="left")
        ax.set_yticks(range(len(others)), others if ax is axes[0] else [""] * len(others))
        ax.invert_yaxis()
        ax.grid(axis="x", color="#e6e6e6", lw=0.7)
        ax.set_axisbelow(True)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    _q(axes[3], report)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _q(ax: Any, report: Report) -> None:
    """What the moment estimate reads, beside twice the true share of swapped pairs."""
    for rate in report.scale.swapped:
        curves = [seed["arms"]["moment q"][f"{rate:g}"]["q"] for seed in report.seeds]
        steps = [point["step"] for point in curves[0]]
        for curve in curves:
            ax.plot(steps, [point["rejected"] for point in curve], color=COLOURS[rate], lw=0.6, alpha=0.4)
        means = [estimate(curve[i]["rejected"] for curve in curves).mean for i in range(len(steps))]
        ax.plot(steps, means, color=COLOURS[rate], lw=2)
        ax.axhline(2 * rate, color=COLOURS[rate], lw=1, ls=":")
    ax.set_title("q of “moment q” over steps\n(dotted: twice the share swapped)", loc="left")
    ax.set_ylim(-0.03, 1.05)


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x
