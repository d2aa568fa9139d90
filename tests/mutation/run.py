"""Judges mutants: which tests can notice, which one did, and whether an earlier verdict still holds."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from mutation import trace
from mutation.judge import judge
from mutation.mutate import Mutant, mutants
from mutation.scratch import ROOT, Child, Scratch
from mutation.trace import digest, library, load, test_files

RESULTS = trace.CACHE / "results.jsonl"
LEAST, FACTOR = 120.0, 10.0
"""Seconds of a core that a mutant may use: the least, and as a multiple of what its tests took under the tracer."""
BATCHES = (4.0, 40.0, 400.0)
"""Seconds of tests that are collected at a time: most mutants die in the first."""


@dataclass
class Result:
    id: str
    outcome: str  # killed, timeout, survived, untested, invalid
    killer: str
    tests: int  # that passed before
    seconds: float
    state: str  # in which it holds
    command: str = ""


class Tests:
    """Who executes a line, from the traced runs."""

    def __init__(self, tiers: Iterable[str], stale: bool = False):
        self.tiers = list(tiers)
        self.stale = trace.stale(self.tiers)
        self.seconds: dict[str, float] = {}
        self.by_line: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for tier in self.tiers:
            for name in test_files():
                traced = load(name, tier, stale)
                if traced is None:
                    continue
                for test, by_file in traced.lines.items():
                    if test in traced.seconds and test not in traced.failed:
                        self.seconds[test] = traced.seconds[test]
                        for file, lines in by_file.items():
                            for line in lines:
                                self.by_line[file][line].add(test)
        self.importers = _importers()

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that execute the mutant's lines, fastest first, and before their like those of other functions."""
        lines = self.by_line[mutant.file]
        found: set[str] = set()
        for line in lines if mutant.lines is None else range(mutant.lines[0], mutant.lines[1] + 1):
            found |= lines.get(line, set())
        if mutant.lines is None and not found:  # constants, of which nothing is executed: whoever uses a user of them
            found = {test for user in self.importers[mutant.file] for x in self.by_line[user].values() for test in x}
        likes: dict[str, int] = defaultdict(int)
        ranked = []
        for test in sorted(found, key=lambda x: (self.seconds[x], x)):
            like = test.split("[")[0]
            likes[like] += 1
            ranked.append(((self.seconds[test] + 0.05) * likes[like], test))
        return [test for _, test in sorted(ranked)]

    def batches(self, tests: list[str], most: float) -> list[list[str]]:
        """In pieces, of at most so many seconds in all."""
        pieces: list[list[str]] = [[]]
        spent = in_piece = 0.0
        for test in tests:
            spent, in_piece = spent + self.seconds[test], in_piece + self.seconds[test]
            if spent > most and pieces[0]:
                break
            if in_piece > BATCHES[min(len(pieces), len(BATCHES)) - 1] and pieces[-1]:
                pieces.append([])
                in_piece = self.seconds[test]
            pieces[-1].append(test)
        return [piece for piece in pieces if piece]


def _importers() -> dict[str, set[str]]:
    """For every file of the library those that import it, directly or not."""
    direct: dict[str, set[str]] = defaultdict(set)
    for name in library():
        for node in ast.walk(ast.parse((ROOT / name).read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("napo_loss"):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    path = f"{module.replace('.', '/')}.py".replace("napo_loss/kernels/", "kernels/")
                    direct[path].add(name)
    found = {}
    for name in library():
        reached, todo = set(), [name]
        while todo:
            for user in direct[todo.pop()] - reached:
                reached.add(user)
                todo.append(user)
        found[name] = reached
    return defaultdict(set, found)


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


def everything(names: Iterable[str] | None = None) -> dict[str, Mutant]:
    """Every mutant by its id."""
    found = [x for name in names or library() for x in mutants(name, (ROOT / name).read_bytes())]
    return {x.id: x for x in found}


def sample(chosen: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of them, from each file as many; which ones follows from seed and id, so other mutants' coming changes
    little."""
    by_file: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in chosen:
        by_file[mutant.file].append(mutant)
    rank = {x.id: hashlib.sha256(f"{seed} {x.id}".encode()).hexdigest() for xs in by_file.values() for x in xs}
    rows = [sorted(xs, key=lambda x: rank[x.id]) for xs in by_file.values()]
    turns = [(i, rank[x.id], x) for xs in rows for i, x in enumerate(xs)]
    return [x for _, _, x in sorted(turns, key=lambda turn: turn[:2])][:count]


PARTIAL = " partial"
"""Ends the state of a verdict that some of the tests were not asked for: good enough to be read, not to be kept."""


def past(all_mutants: dict[str, Mutant], tiers: list[str], partial: bool = False) -> dict[str, Result]:
    """Verdicts of earlier runs that still hold."""
    found: dict[str, Result] = {}
    for row in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        result = Result(**json.loads(row))
        mutant = all_mutants.get(result.id)
        if mutant is not None:
            killed = result.outcome == "killed"
            now = killed_state(mutant, result.killer) if killed else whole_state(",".join(tiers))
            if result.state == now or (partial and result.state == now + PARTIAL):
                found[result.id] = result
    return found


def forget(killers: Iterable[str]) -> None:
    """Takes back what tests have noticed that fail by themselves."""
    kept = [row for row in RESULTS.read_text().splitlines(True) if json.loads(row)["killer"] not in set(killers)]
    RESULTS.write_text("".join(kept))


class Court:
    """As many mutants at a time as there are copies of the tree."""

    def __init__(self, scratches: list[Scratch], tests: Tests, most: float = float("inf"), partial: bool = False):
        self.scratches, self.tests, self.most = scratches, tests, most
        self.partial = partial or bool(tests.stale) or most < float("inf")

    def try_all(self, wanted: Iterable[Mutant], batches: dict[str, list[list[str]]] | None = None):
        """Yields a mutant and its result as each is known. ``batches`` says which tests to run, if not those that the
        traced runs name. One that was out of time is tried again, alone and with four times as much."""
        waiting, running, again = list(wanted), [], []
        while waiting or running or again:
            if not waiting and not running:
                waiting, last = [again.pop(0)], True
            else:
                last = False
            while waiting and len(running) < len(self.scratches):
                mutant = waiting.pop(0)
                free = next(x for x in self.scratches if all(x is not entry[0] for entry in running))
                pieces = batches[mutant.id] if batches else self.tests.batches(self.tests.of(mutant), self.most)
                source = mutant.apply((ROOT / mutant.file).read_bytes())
                if not pieces or not _parses(source):
                    yield mutant, self._result(mutant, "invalid" if pieces else "untested", "", 0, 0.0)
                    continue
                limit = max(LEAST, FACTOR * sum(self.tests.seconds.get(x, 10.0) for piece in pieces for x in piece))
                running.append((free, mutant, self._start(free, mutant, source, pieces), limit * (4 if last else 1)))
            time.sleep(0.05)
            for entry in list(running):
                scratch, mutant, child, limit = entry
                code = child.poll()
                late = code is None and child.looked() and child.over(limit)
                if late:
                    child.kill()
                    os.waitpid(child.pid, 0)
                elif code is None:
                    continue
                running.remove(entry)
                child.reap()
                scratch.restore(mutant.file)
                if late and limit < 4 * LEAST and not last:
                    again.append(mutant)
                    continue
                yield mutant, self._verdict(scratch, mutant, child, late, code)

    def control(self, tests: Iterable[str]) -> list[str]:
        """Those of the tests that fail though nothing is changed: what they noticed is nothing."""
        left, failing = sorted(set(tests)), []
        while left:
            answer = self.scratches[0].root.parent / "answer.json"
            answer.unlink(missing_ok=True)
            child = self.scratches[0].fork(judge, [left], answer)
            os.waitpid(child.pid, 0)
            child.reap()
            found = json.loads(answer.read_text())
            if not found["killer"]:
                break
            failing.append(found["killer"])
            left.remove(found["killer"])
        return failing

    def _start(self, scratch: Scratch, mutant: Mutant, source: bytes, pieces: list[list[str]]) -> Child:
        scratch.write(mutant.file, source)
        answer = scratch.root.parent / "answer.json"
        answer.unlink(missing_ok=True)
        return scratch.fork(judge, pieces, answer)

    def _verdict(self, scratch: Scratch, mutant: Mutant, child: Child, late: bool, code: int | None) -> Result:
        seconds = time.monotonic() - child.started
        answer = scratch.root.parent / "answer.json"
        if late:
            return self._result(mutant, "timeout", "", 0, seconds)
        if not answer.exists():  # the process itself died: a segmentation fault is noticed, too
            return self._result(mutant, "killed", f"(exit code {code})", 0, seconds)
        found = json.loads(answer.read_text())
        if found["code"] and not found["killer"] and not found["passed"]:
            raise RuntimeError(f"pytest could not run the tests of {mutant}:\n{scratch.log.read_text()[-3000:]}")
        return self._result(
            mutant, "killed" if found["killer"] else "survived", found["killer"], found["passed"], seconds
        )

    def _result(self, mutant: Mutant, outcome: str, killer: str, tests: int, seconds: float) -> Result:
        state = killed_state(mutant, killer) if outcome == "killed" else whole_state(",".join(self.tests.tiers))
        if outcome != "killed" and self.partial:
            state += PARTIAL
        return Result(mutant.id, outcome, killer, tests, round(seconds, 1), state)


def _parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
