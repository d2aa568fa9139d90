"""What became of a mutant, kept between runs for as long as it holds."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from mutation import trace
from mutation.mutate import Mutant
from mutation.scratch import ROOT
from mutation.trace import digest, library, test_files

RESULTS = trace.CACHE / "results.jsonl"


@dataclass
class Result:
    id: str
    outcome: str  # killed, timeout, survived, untested, invalid
    killer: str
    tests: int  # that passed before
    seconds: float
    state: str  # in which it holds
    command: str = ""


def function_of(name: str) -> str:
    """Of a test's name in its file, the function's."""
    return name.split("[")[0].split("::")[-1]


@cache
def functions(test_file: str) -> dict[str, str]:
    tree = ast.parse((ROOT / test_file).read_bytes())
    return {node.name: ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def killed_state(mutant: Mutant, killer: str) -> str:
    """What a kill depends on: the file of the mutant, and the test that noticed."""
    file, _, name = killer.removesuffix(" (import)").partition("::")
    test = functions(file).get(function_of(name), digest(file)) if (ROOT / file).is_file() else "gone"
    return hashlib.sha256(f"{digest(mutant.file)} {test}".encode()).hexdigest()[:16]


@cache
def whole_state(tiers: str) -> str:
    """What surviving depends on: everything."""
    names = [*library(), *test_files(), *trace.helpers()]
    return hashlib.sha256(" ".join([tiers, *map(digest, names)]).encode()).hexdigest()[:16]


PARTIAL = " partial"
"""Ends the state of a verdict that some of the tests were not asked for: good enough to be read, not to be kept."""


def past(all_mutants: dict[str, Mutant], tiers: list[str], partial: bool = False) -> dict[str, Result]:
    """Verdicts of earlier runs that still hold: a kill outweighs the rest. With ``partial`` also of mutants that once
    survived other tests than there are now: a report must not lose them, for then only the killed would be left."""
    found: dict[str, Result] = {}
    for row in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        result = Result(**json.loads(row))
        mutant, before = all_mutants.get(result.id), found.get(result.id)
        if mutant is None:
            continue
        if result.outcome == "killed":
            holds = result.state == killed_state(mutant, result.killer)
        else:
            holds = partial or result.state == whole_state(",".join(tiers))
        if holds and (before is None or before.outcome != "killed"):
            found[result.id] = result
    return found


def forget(killers: Iterable[str]) -> None:
    """Takes back what tests have noticed that fail by themselves."""
    kept = [row for row in RESULTS.read_text().splitlines(True) if json.loads(row)["killer"] not in set(killers)]
    RESULTS.write_text("".join(kept))
