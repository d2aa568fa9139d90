"""The map from lines to tests, made by running every test once under a tracer, and the state for which it holds.

With the examples that will judge: what they reach is what is seen. Not seen is what `torch.compile` only reads; a
mutant of such lines alone is called untested, and no survivor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mutation import hits
from mutation.scratch import ROOT, Scratch

CACHE = ROOT / "runs" / "mutation"
BESIDE = {
    "test_benchmarks": "what is measured and how",
    "test_counted": "what compilers make of kernels",
    "test_demo": "runs the demo from start to end, without the library's own claims",
    "test_github": "workflows and templates",
    "test_house": "imports and sizes: the text of the code, not what it does",
    "test_mutation": "would mutate in here",
    "test_package": "builds and installs copies",
    "test_processes": "starts pytest on other tests",
    "test_readme": "pages; their code blocks repeat what other tests check",
    "test_noise_study": "the study's tables",
}
"""Test files that judge no mutant, and why."""


def test_files() -> list[str]:
    """Files of tests and of doctests, as pytest's arguments."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem not in BESIDE]
    doctests = [path for path in library() if ">>>" in (ROOT / path).read_text()]
    return [str(path.relative_to(ROOT)) for path in found] + doctests


def library() -> list[str]:
    """Every file that is mutated."""
    inside = [*(ROOT / "napo_loss").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    names = {str(path.relative_to(ROOT)) for path in inside}
    return sorted(name for name in names if not name.startswith("napo_loss/kernels/"))


@cache
def digest(name: str, root: Path = ROOT) -> str:
    path = root / name
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "gone"


def helpers() -> list[str]:
    """What any test may import; a change here makes all that was traced worthless."""
    found = [path for path in (ROOT / "tests").glob("*.py") if not path.stem.startswith("test_")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


@dataclass
class Traced:
    """A test file's tests: seconds each, and the lines that each executes."""

    seconds: dict[str, float]
    failed: list[str]
    lines: dict[str, dict[str, list[int]]]  # test, file, lines
    files: dict[str, str]  # what it depends on, with the digest of then

    def fresh(self) -> bool:
        return all(digest(name) == then for name, then in self.files.items())


TIERS = {"quick": "not slow", "slow": "slow"}
"""What pytest selects: the tests of ``make test``, and those that ``make test-all`` adds."""


def _shard(test_file: str, tier: str) -> Path:
    return CACHE / "traced" / tier / (test_file.replace("/", ".") + ".json")


def load(test_file: str, tier: str, stale: bool = False) -> Traced | None:
    """What was traced, if it still holds, or if ``stale`` will do."""
    path = _shard(test_file, tier)
    if not path.exists():
        return None
    traced = Traced(**json.loads(path.read_text()))
    return traced if stale or traced.fresh() else None


class Plugin:
    """Tells all processes which test runs, and keeps how long each took."""

    def __init__(self, folder: Path):
        self.now = hits.Now(folder)
        self.numbers: dict[str, int] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid, location):
        self.numbers[nodeid] = len(self.numbers) + 1
        self.now.set(self.numbers[nodeid])

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        if report.skipped:
            self.seconds[report.nodeid] = float("inf")

    def pytest_runtest_logfinish(self, nodeid, location):
        self.now.set(hits.NOBODY)


COMPILED = "tests/test_kernels.py::test_compiled_for_every_target_and_no_worse_than_committed"
"""Takes minutes, and judges the compiler's output."""
OPTIONS = [
    "-q", "--deselect", COMPILED, "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning",
]  # fmt: skip


def _run(test_file: str, tier: str, folder: Path, root: Path) -> int:
    import pytest

    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(root / 'tests')!r})\nfrom mutation import hits\n"
        f"del sys.path[0]\nhits.start({str(folder)!r}, {str(root)!r})\n"
    )
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{root}"
    plugin = Plugin(folder)
    hits.start(str(folder), str(root))
    from mutation.judge import Quiet

    pytest.main([*OPTIONS, "-m", TIERS[tier], test_file], plugins=[plugin, Quiet()])
    sys.settrace(None)
    names = {number: name for name, number in plugin.numbers.items()}
    lines: dict = {}
    for number, found in hits.read(folder).items():
        by_file = lines.setdefault(names[number], defaultdict(list))
        for name, line in sorted(found):
            by_file[name].append(line)
    seconds = {name: round(x, 3) for name, x in plugin.seconds.items() if x != float("inf")}
    (folder / "result.json").write_text(
        json.dumps({"seconds": seconds, "failed": sorted(plugin.failed), "lines": lines})
    )
    return 0


def trace(test_file: str, tier: str, scratch: Scratch):
    """Starts to trace a file of tests. Returns the child, and what to call when it has ended."""
    folder = scratch.root.parent / "hits"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    child = scratch.fork(_run, test_file, tier, folder, scratch.root)

    def finish() -> Traced:
        result = folder / "result.json"
        if not result.exists():
            raise RuntimeError(f"tracing {test_file} ended early:\n{scratch.log.read_text()[-3000:]}")
        found = json.loads(result.read_text())
        executed = {name for by_file in found["lines"].values() for name in by_file}
        depends = {test_file, *helpers(), *executed}
        traced = Traced(**found, files={name: digest(name, scratch.root) for name in sorted(depends)})
        path = _shard(test_file, tier)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(traced.__dict__))
        return traced

    return child, finish


def stale(tiers: list[str]) -> list[tuple[str, str]]:
    """Test files, with their tier, whose map does not hold."""
    return [(name, tier) for tier in tiers for name in test_files() if load(name, tier) is None]


def trace_all(scratches: list[Scratch], waiting: list[tuple[str, str]], echo=print) -> None:
    """Traces each of ``waiting``, as many at a time as there are copies of the tree."""
    waiting, running = list(waiting), []
    while waiting or running:
        while waiting and len(running) < len(scratches):
            free = next(x for x in scratches if all(x is not entry[0] for entry in running))
            running.append((free, waiting[0], *trace(*waiting.pop(0), free)))
        time.sleep(0.1)
        for entry in list(running):
            _, (name, tier), child, finish = entry
            if child.poll() is not None:
                child.reap()
                running.remove(entry)
                traced = finish()
                echo(f"{name} ({tier}): {len(traced.seconds)} tests, {sum(traced.seconds.values()):.0f} s"
                     + (f", FAILED {traced.failed}" if traced.failed else ""))  # fmt: skip
