"""A quick check without any trace: do the tests that killed mutants of the committed table kill them still?"""

from __future__ import annotations

import csv
import tempfile
from collections import defaultdict
from pathlib import Path

from mutation import report, run, scratch, verdicts
from mutation.mutate import Mutant

LEAST = 0.5
"""Share of the table's mutants that the code must still have, for the table to say something about it."""


def kills() -> list[dict]:
    """Rows of the table that name a test."""
    with report.TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["outcome"] == "killed" and "::" in row["killer"]]


def exists(test: str) -> bool:
    """Whether a test file has the function; its parameters are pytest's to find."""
    file, _, name = test.removesuffix(" (import)").partition("::")
    if not (scratch.ROOT / file).is_file():
        return False
    return not file.startswith("tests/") or verdicts.function_of(name) in verdicts.functions(file)


def check(found: dict[str, Mutant], count: int, seed: int, jobs: int) -> int:
    """Runs the killers of ``count`` mutants, and what else has killed some of the same file. Returns the exit code."""
    rows = {row["id"]: row for row in kills()}
    bad = report.faults(found, {}, report.equivalents())
    known = [found[id] for id in rows if id in found]
    if len(known) < LEAST * len(rows):
        bad.append(f"of {len(rows)} mutants in {report.TABLE.name} {len(known)} exist: run `make mutants` anew")
    others: dict[str, set[str]] = defaultdict(set)  # of a file: whatever killed mutants of it
    for row in rows.values():
        if exists(row["killer"]) and " " not in row["killer"]:
            others[row["file"]].add(row["killer"].split("[")[0])
    chosen = [x for x in run.sample(known, len(known), seed) if exists(rows[x.id]["killer"])][:count]
    killers = {x.id: rows[x.id]["killer"].removesuffix(" (import)") for x in chosen}
    scratch.warm()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        court = run.Court([scratch.Scratch(Path(folder) / str(i)) for i in range(jobs)], run.Tests([]))
        batches = {x.id: [[killers[x.id]], sorted(others[x.file])] for x in chosen}
        for mutant, result in court.try_all(chosen, {id: [b for b in two if b] for id, two in batches.items()}):
            print(f"{result.outcome} in {result.seconds} s by {result.killer or 'none'}: {mutant}", flush=True)
            if result.outcome not in ("killed", "timeout"):
                bad.append(f"{result.outcome}: {mutant}; `make mutants MUTANTS='--ids {mutant.id}'` asks all tests")
        bad += [f"fails without a mutant: {test}" for test in court.control(killers.values())]
    print(*bad, sep="\n")
    return 1 if bad else 0
