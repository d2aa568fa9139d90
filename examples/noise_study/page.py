"""Figures and tables of ``docs/noise_study.md``: written beside the CSV, the tables into the page too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.noise_study import results
from examples.noise_study.findings import (
    Rows,
    common,
    converged,
    curve,
    difference,
    estimate,
    own_best,
    present,
    where,
)  # fmt: skip
from examples.noise_study.losses import GROUPS
from examples.noise_study.plan import AT_ALL_SETTINGS, BETA, ESTIMATES, MAPPED, RATE, RATES

PAGE = Path(__file__).parents[2] / "docs" / "noise_study.md"
TUNED_ON = 0.2
"""The rate on which a map from moments to q may be chosen; the others are held out."""


def write(folder: Path) -> None:
    rows = results.read(folder / "runs.csv")
    if not rows:
        raise SystemExit(f"{folder / 'runs.csv'} has no runs")
    tables = {name: table(rows) for name, table in TABLES.items()} | {"made": made(folder, rows)}
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n")
    if folder == results.FOLDER and PAGE.exists():
        PAGE.write_text(filled(PAGE.read_text(), tables))
    from examples.noise_study.figures import draw

    draw(rows, folder)
    print("\n\n".join(tables.values()))


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its marks."""
    for name, text in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = pattern.sub(lambda marks, text=text: f"{marks[1]}\n{text}\n\n{marks[2]}", page)
    return page


def made(folder: Path, rows: Rows) -> str:
    sittings = json.loads((folder / "machine.json").read_text()) if (folder / "machine.json").exists() else []
    seeds = sorted({int(row["seed"]) for row in rows})
    runs = len(results.done(rows))
    x = sittings[-1] if sittings else results.machine()
    commits = " and ".join(dict.fromkeys(s["commit"] for s in sittings)) or x["commit"]
    minutes = sum(s["seconds"] for s in sittings) / 60
    return (
        f"{runs} runs, seeds {seeds[0]} to {seeds[-1]}, {minutes:.0f} minutes on {x['cores']} cores of an {x['cpu']}; "
        f"torch {x['torch']}, numpy {x['numpy']}; commit {commits}."
    )


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in body])


def at_convergence(rows: Rows) -> str:
    """All losses at the one setting, by rate of swaps."""
    pictures = converged(where(rows, task="pictures", noise="swapped"))
    return _by_rate(pictures, [*AT_ALL_SETTINGS], f"%, β = {BETA:g}, learning rate {RATE:g}, last epoch")


def _by_rate(rows: Rows, losses: list[str], title: str) -> str:
    rates = sorted({row["rate"] for row in rows})
    body = []
    for loss in present(rows, losses):
        line = [loss]
        for rate in rates:
            mine, dpo = where(rows, loss=loss, rate=rate), where(rows, loss="DPO", rate=rate)
            line.append(str(estimate(r["test"] for r in mine)) if loss == "DPO" else difference(mine, dpo).signed)
        body.append(line)
    return _markdown([title, *(f"{rate:.0%} swapped".replace("%", " %") for rate in rates)], body)


def at_own_best(rows: Rows) -> str:
    """Each loss where clean validation data would put it, over β, learning rate and epochs."""
    body, head = [], ["%, at its own best on clean validation questions"]
    for rate in MAPPED:
        head += [f"{rate:.0%} swapped".replace("%", " %"), "β, learning rate, epochs"]
    pictures = where(rows, task="pictures", noise="swapped")
    for loss in present(rows, AT_ALL_SETTINGS):
        line = [loss]
        for rate in MAPPED:
            point, best = own_best(where(pictures, loss=loss, rate=rate))
            _, dpo = own_best(where(pictures, loss="DPO", rate=rate))
            line.append(str(estimate(r["test"] for r in best)) if loss == "DPO" else difference(best, dpo).signed)
            line.append(f"{point.beta:g}, {point.learning_rate:g}, {point.epoch:g}")
        body.append(line)
    return _markdown(head, body)


def other_noise(rows: Rows) -> str:
    """Noise of other kinds, and another task, at the one setting."""
    columns: dict[str, Rows] = {
        "30 %, close pairs likelier": where(rows, task="pictures", noise="close", rate=0.3),
        "30 % of the rejected right": where(rows, task="pictures", noise="right", rate=0.3),
        "text, no swaps": where(rows, task="text", noise="swapped", rate=0.0),
        "text, 30 % swapped": where(rows, task="text", noise="swapped", rate=0.3),
    }
    columns = {title: converged(x) for title, x in columns.items() if x}
    body = []
    for loss in AT_ALL_SETTINGS:
        line = [loss]
        for x in columns.values():
            mine, dpo = where(x, loss=loss), where(x, loss="DPO")
            if not mine:
                line.append("–")
            else:
                line.append(str(estimate(r["test"] for r in mine)) if loss == "DPO" else difference(mine, dpo).signed)
        body.append(line)
    return _markdown(["%, last epoch", *columns], body)


def groups(rows: Rows) -> str:
    """Two negatives a question."""
    x = converged(where(rows, task="pictures", noise="swapped"))
    body = []
    first = next(iter(GROUPS))
    for loss in present(x, GROUPS):
        line = [loss]
        for rate in MAPPED:
            mine, plain = where(x, loss=loss, rate=rate), where(x, loss=first, rate=rate)
            line.append(str(estimate(r["test"] for r in mine)) if loss == first else difference(mine, plain).signed)
        body.append(line)
    return _markdown(["%, two negatives, last epoch", *(f"{r:.0%} swapped".replace("%", " %") for r in MAPPED)], body)


def maps(rows: Rows) -> str:
    """From moments to q: chosen at one rate, seen at the others."""
    x = converged(where(rows, task="pictures", noise="swapped"))
    names = present(x, ["moment", *ESTIMATES])
    body = []
    for loss in names:
        line = [loss]
        for rate in RATES:
            mine, plain = where(x, loss=loss, rate=rate), where(x, loss="moment", rate=rate)
            line.append(str(estimate(r["test"] for r in mine)) if loss == "moment" else difference(mine, plain).signed)
        held_out = [where(x, loss=loss, rate=rate) for rate in RATES if rate != TUNED_ON]
        plain = [where(x, loss="moment", rate=rate) for rate in RATES if rate != TUNED_ON]
        line.append("" if loss == "moment" else difference(_mean(held_out), _mean(plain)).signed)
        body.append(line)
    head = ["%, last epoch", *(f"{rate:.0%} swapped".replace("%", " %") for rate in RATES), "rates but 20 %"]
    return _markdown(head, body)


def _mean(parts: list[Rows]) -> Rows:
    """Of each seed over several conditions."""
    seeds = set.intersection(*({row["seed"] for row in part} for part in parts))
    return [
        {"seed": seed, "test": float(np.mean([row["test"] for part in parts for row in where(part, seed=seed)]))}
        for seed in seeds
    ]


def estimators(rows: Rows) -> str:
    """What each rule says of the margins a plain DPO run has by an epoch; and whether they tell who was swapped."""
    x = common(where(rows, task="pictures", noise="swapped"))
    body = []
    for loss in ("DPO", "moment"):
        for rate in RATES:
            mine = where(x, loss=loss, rate=rate)
            for column, title in (
                ("q_released", "released q"), ("q_moment", "moment q"), ("q_moment_of_8", "moment q of 8 pairs"),
                ("precision", "swapped among as many lowest margins"),
            ):  # fmt: skip
                if column == "precision" and not rate:
                    continue
                _, found = curve(mine, column)
                body.append([f"{loss}, {100 * rate:.0f} % swapped: {title}", *(f"{e.mean:.2f}" for e in found)])
    epochs, _ = curve(x, "q_moment")
    return _markdown(["trained with", *(f"epoch {epoch:g}" for epoch in epochs)], body)


TABLES: dict[str, Callable[[Rows], str]] = {
    "converged": at_convergence,
    "own_best": at_own_best,
    "other_noise": other_noise,
    "groups": groups,
    "maps": maps,
    "estimators": estimators,
}
