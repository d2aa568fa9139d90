"""Figures and tables of ``docs/noise_study.md``: written beside the CSV, the tables into the page too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import header, line
from benchmarks.suite import paste
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
    walked,
    where,
)  # fmt: skip
from examples.noise_study.losses import GROUPS
from examples.noise_study.plan import AT_ALL_SETTINGS, AXES_SEEDS, BETA, ESTIMATES, MAPPED, RATE, RATES

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
        if folder == results.FOLDER:
            paste(PAGE, folder / f"{name}.md", text)
    from examples.noise_study.figures import draw

    draw(rows, folder)
    print("\n\n".join(tables.values()))


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
    return "\n".join([*header(head[0], head[1:]), *(line(cells[0], cells[1:]) for cells in body)])


def _swapped(rates: Iterable[float]) -> list[str]:
    return [f"{100 * rate:.0f} % swapped" for rate in rates]


def _cell(mine: Rows, base: Rows) -> str:
    """The accuracy of what all are compared with; of the others the difference to it."""
    if not mine:
        return "–"
    return str(estimate(row["test"] for row in mine)) if mine == base else difference(mine, base).signed


def _by_rate(rows: Rows, losses: Sequence[str], rates: Iterable[float]) -> list[list[str]]:
    """A line of each loss, compared with the first."""
    return [
        [loss, *(_cell(where(rows, loss=loss, rate=r), where(rows, loss=losses[0], rate=r)) for r in rates)]
        for loss in present(rows, losses)
    ]


def at_convergence(rows: Rows) -> str:
    """All losses at the one setting, by rate of swaps."""
    pictures = converged(where(rows, task="pictures", noise="swapped"))
    rates = sorted({row["rate"] for row in pictures})
    title = f"%, β = {BETA:g}, learning rate {RATE:g}, last epoch"
    return _markdown([title, *_swapped(rates)], _by_rate(pictures, AT_ALL_SETTINGS, rates))


def at_own_best(rows: Rows) -> str:
    """Each loss where clean validation data would put it, over β, learning rate and epochs."""
    pictures = walked(where(rows, task="pictures", noise="swapped"))
    head = [f"%, {AXES_SEEDS} seeds, at its own best on clean validation questions"]
    head += [title for swapped in _swapped(MAPPED) for title in (swapped, "β, learning rate, epochs")]
    body = []
    for loss in present(pictures, AT_ALL_SETTINGS):
        cells = [loss]
        for rate in MAPPED:
            point, best = own_best(where(pictures, loss=loss, rate=rate))
            _, dpo = own_best(where(pictures, loss="DPO", rate=rate))
            cells += [_cell(best, dpo), f"{point.beta:g}, {point.learning_rate:g}, {point.epoch:g}"]
        body.append(cells)
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
    body = [
        [loss, *(_cell(where(x, loss=loss), where(x, loss="DPO")) for x in columns.values())]
        for loss in AT_ALL_SETTINGS
    ]
    return _markdown(["%, last epoch", *columns], body)


def groups(rows: Rows) -> str:
    """Two negatives a question."""
    x = converged(where(rows, task="pictures", noise="swapped"))
    return _markdown(["%, two negatives, last epoch", *_swapped(MAPPED)], _by_rate(x, [*GROUPS], MAPPED))


def maps(rows: Rows) -> str:
    """From moments to q: chosen at one rate, seen at the others."""
    x = converged(where(rows, task="pictures", noise="swapped"))
    body = _by_rate(x, ["moment", *ESTIMATES], RATES)
    held_out = [rate for rate in RATES if rate != TUNED_ON]
    for cells in body:
        mine, plain = (_mean([where(x, loss=loss, rate=rate) for rate in held_out]) for loss in (cells[0], "moment"))
        cells.append("" if mine == plain else difference(mine, plain).signed)
    return _markdown(["%, last epoch", *_swapped(RATES), "rates but 20 %"], body)


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
