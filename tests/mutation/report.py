"""Equivalents, and what is written of the verdicts: a table of every mutant tried, and the page."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from mutation.mutate import Mutant
from mutation.scratch import ROOT
from mutation.verdicts import Result, whole_state

HERE = Path(__file__).parent
EQUIVALENT, TABLE, PAGE = HERE / "equivalent.toml", HERE / "results.csv", ROOT / "docs" / "mutants.md"
OUTCOMES = ("killed", "timeout", "equivalent", "survived", "untested")
INTRODUCTION = """\
# Is there a test for it?

Tests pass on right code; whether they would fail on wrong code is another question. `make mutants` asks it: it changes
one thing in a copy of the library (`<` to `<=`, a constant to the next, a keyword or a statement to nothing), runs the
tests that execute the changed lines, and calls the mutant *killed* where one fails. What no test notices is a
*survivor*: a missing test, needless code, or a change that changes nothing (*equivalent*, each with its reason in
[tests/mutation/equivalent.toml](../tests/mutation/equivalent.toml)). An equivalent that is killed, or that is gone from
the code, is an error.

This page is written by the tool, of the mutants that have been tried; the share is of those that are not equivalent.
"""


def equivalents() -> dict[str, dict]:
    """By id; each has a reason."""
    import tomllib

    entries = tomllib.loads(EQUIVALENT.read_text()).get("equivalent", [])
    found = {entry["id"]: entry for entry in entries}
    if len(found) != len(entries) or not all(entry["reason"].strip() for entry in entries):
        raise ValueError(f"{EQUIVALENT.name}: every entry has an id of its own and a reason")
    return found


def faults(found: dict[str, Mutant], outcomes: dict[str, str], listed: dict[str, dict]) -> list[str]:
    """What is wrong with the list, given what became of the mutants that were tried."""
    bad = []
    for id, entry in listed.items():
        what = f"{id} ({entry['where']}: {entry['change']})"
        if id not in found:
            bad.append(f"listed as equivalent, but there is no such mutant any more: {what}")
        elif outcomes.get(id) in ("killed", "timeout"):
            bad.append(f"listed as equivalent, but noticed ({outcomes[id]}): {what}")
    return bad


def room(file: str) -> str:
    parts = file.split("/")
    return parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 2 else "top"


def rows(found: dict[str, Mutant], results: dict[str, Result], listed: dict[str, dict], now: str) -> list[dict]:
    """``now``: the state of all tests; what survived in another one survived other tests, or some of them."""
    made = []
    for id, result in results.items():
        mutant = found[id]
        outcome = "equivalent" if result.outcome == "survived" and id in listed else result.outcome
        before, after = (" ".join(text.split())[:100] for text in (mutant.before, mutant.after))
        made.append(
            {"id": id, "file": mutant.file, "function": mutant.function, "line": mutant.line, "kind": mutant.kind,
             "before": before, "after": after, "outcome": outcome, "killer": result.killer,
             "by": "" if result.outcome == "killed" or result.state == now else "other tests, or some"}
        )  # fmt: skip
    return sorted(made, key=lambda row: (row["file"], row["line"], row["id"]))


def tables(made: list[dict]) -> str:
    """By room, and by kind of change."""
    text = []
    for title, key in (("room", lambda row: room(row["file"])), ("change", lambda row: row["kind"])):
        text += [
            f"| {title} | tried | {' | '.join(OUTCOMES)} | share killed |",
            f"|---|{'---:|' * (len(OUTCOMES) + 2)}",
        ]
        groups = sorted({key(row) for row in made})
        for name in [*groups, "all"]:
            count = Counter(row["outcome"] for row in made if name == "all" or key(row) == name)
            judged = sum(count.values()) - count["equivalent"]
            share = f"{(count['killed'] + count['timeout']) / judged:.1%}" if judged else ""
            cells = [name, sum(count.values()), *(count[outcome] for outcome in OUTCOMES), share]
            text.append(f"| {' | '.join(map(str, cells))} |")
        text.append("")
    return "\n".join(text)


def survivors(made: list[dict]) -> str:
    left = [row for row in made if row["outcome"] in ("survived", "untested")]
    lines = [
        f"- `{x['file']}:{x['line']}` `{x['before']}` → `{x['after']}` ({x['id']}, {x['outcome']}"
        + (f"; judged by {x['by']} of today's)" if x["by"] else ")")
        for x in left
    ]
    return "\n".join(lines) or "None."


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def write(found: dict[str, Mutant], results: dict[str, Result], tiers: Iterable[str]) -> int:
    """Writes table and page, says what is wrong. Returns the exit code."""
    listed = equivalents()
    results = {id: result for id, result in results.items() if result.outcome != "invalid"}
    made = rows(found, results, listed, whole_state(",".join(tiers)))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]) if made else ["id"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    commands = sorted({result.command for result in results.values()})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "trl", "pytest"))
    PAGE.write_text(
        f"{INTRODUCTION}\n{len(found)} mutants exist, {len(made)} were tried, on {date.today()} at commit "
        f"`{_git('rev-parse', '--short', 'HEAD')}`, with the tests of `{' + '.join(tiers)}` (Python "
        f"{platform.python_version()}, {versions}, {platform.machine()} CPU, Triton's interpreter):\n\n"
        + "".join(f"    {command}\n" for command in commands)
        + f"\n{tables(made)}\nEach of them, with the test that killed it: "
        "[tests/mutation/results.csv](../tests/mutation/results.csv).\n\n## Survivors\n\n" + survivors(made) + "\n"
    )
    outcomes = {id: result.outcome for id, result in results.items()}
    bad = faults(found, outcomes, listed)
    left = [row for row in made if row["outcome"] in ("survived", "untested")]
    print(tables(made), *bad, *(f"{x['outcome']}: {found[x['id']]}" for x in left), sep="\n")
    return 1 if bad or left else 0
