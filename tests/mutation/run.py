"""Judges mutants: which tests can notice, which one did, and whether an earlier verdict still holds."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable

from mutation import trace
from mutation.judge import judge
from mutation.mutate import Mutant, mutants
from mutation.scratch import ROOT, Child, Scratch
from mutation.trace import library, load, test_files
from mutation.verdicts import PARTIAL, Result, killed_state, whole_state

LEAST, FACTOR = 120.0, 10.0
"""Seconds of a core that a mutant may use: the least, and as a multiple of what its tests took under the tracer."""
STILL = 90.0
"""Seconds for which a child and what it started may all be asleep: stuck, since who waits for a core is not asleep."""
BATCHES = (4.0, 40.0, 400.0)
"""Seconds of tests that are collected at a time: most mutants die in the first."""


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


class Court:
    """As many mutants at a time as there are copies of the tree."""

    def __init__(self, scratches: list[Scratch], tests: Tests, most: float = float("inf"), partial: bool = False):
        self.scratches, self.tests, self.most = scratches, tests, most
        self.partial = partial or bool(tests.stale) or most < float("inf")

    def try_all(self, wanted: Iterable[Mutant], batches: dict[str, list[list[str]]] | None = None):
        """Yields a mutant and its result as each is known. ``batches`` says which tests to run, if not those that the
        traced runs name. One that stood still is tried again, alone and with more patience."""
        waiting, running, again = [(mutant, False) for mutant in wanted], [], []
        while waiting or running or again:
            if not waiting and not running:
                waiting = [(again.pop(0), True)]
            while waiting and len(running) < len(self.scratches):
                mutant, alone = waiting.pop(0)
                free = next(x for x in self.scratches if all(x is not entry[0] for entry in running))
                pieces = batches[mutant.id] if batches else self.tests.batches(self.tests.of(mutant), self.most)
                source = mutant.apply((ROOT / mutant.file).read_bytes())
                if not pieces or not _parses(source):
                    yield mutant, self._result(mutant, "invalid" if pieces else "untested", "", 0, 0.0)
                    continue
                expected = sum(self.tests.seconds.get(x, 10.0) for piece in pieces for x in piece)
                child = self._start(free, mutant, source, pieces)
                child.limit, child.patience = max(LEAST, FACTOR * expected), STILL * (4 if alone else 1)
                running.append((free, mutant, alone, child))
            time.sleep(0.05)
            for entry in list(running):
                scratch, mutant, alone, child = entry
                code = child.poll()
                late = child.late() if code is None else ""
                if late:
                    child.kill()
                elif code is None:
                    continue
                running.remove(entry)
                child.reap()
                scratch.restore(mutant.file)
                if late == "still" and not alone:
                    again.append(mutant)
                else:
                    yield mutant, self._verdict(scratch, mutant, child, bool(late), code)

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
