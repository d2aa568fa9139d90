"""Runs the timed suites and writes what they leave."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import figure, machine, report
from benchmarks.measure import GPU
from benchmarks.record import Row, merge, read_rows, write_rows
from benchmarks.runner import LIMIT, QUICK_LIMIT, Case, run


def run_suites(suites: Sequence[str], *, quick: bool) -> list[Row]:
    """Returns the rows of this run; the files hold those of suites that did not run, too."""
    cases = [case for suite in suites for case in importlib.import_module(f"benchmarks.{suite}").cases(quick)]
    rows: list[Row] = []
    progress = tqdm(total=len(cases), unit="case", disable=None)
    try:
        for i, row in enumerate(run(cases, limit=QUICK_LIMIT if quick else LIMIT, rows=rows)):
            progress.set_description(f"{row.suite} {row.shape} {'' if row.c is None else f'c={row.c:g} '}{row.what}")
            progress.update(i - progress.n)
        progress.update(len(cases) - progress.n)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept")
    finally:
        progress.close()
        _write(rows, [suite for suite in suites if _finished(suite, cases, rows)], quick)
    return rows


def _finished(suite: str, cases: Sequence[Case], rows: Sequence[Row]) -> bool:
    expected = sum(len(case.providers) for case in cases if case.row.suite == suite)
    return sum(row.suite == suite for row in rows) == expected


def paste(page: Path, table: Path, text: str) -> None:
    """Puts a table between the page's two comments with its path, seen from the page, where the page has them."""
    marker = f"<!-- {Path(os.path.relpath(table, page.parent)).as_posix()} -->"
    parts = page.read_text().split(marker) if page.exists() else []
    if len(parts) == 3:
        page.write_text(f"{parts[0]}{marker}\n\n{text.strip()}\n\n{marker}{parts[2]}")


def _write(rows: list[Row], finished: Sequence[str], quick: bool) -> None:
    folder, stem = machine.ROOT / ("runs" if quick else "benchmarks/results"), machine.file_stem()
    path = folder / f"{stem}.csv"
    kept = merge(read_rows(path), rows, finished)
    write_rows(path, kept)
    for suite, text in report.tables(kept).items():
        table = folder / f"{stem}-{suite}.md"
        table.write_text(text)
        paste(machine.ROOT / "docs/benchmarks.md", table, text)
        if any(row.suite == suite for row in rows):
            print(f"\n{suite}\n{text}")
    if GPU and any(row.suite == "logits" for row in rows):
        print(*report.goals(rows), sep="\n")
    figure.draw(kept, folder / f"{stem}.png")
    print(f"written: {path}, {stem}.png and the tables {stem}-*.md beside it")
