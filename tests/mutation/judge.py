"""What a child does: run tests, stop at the first that fails, say which."""

from __future__ import annotations

import json
from pathlib import Path

OPTIONS = [
    "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "--no-header", "--hypothesis-seed=0", "--disable-warnings",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
]  # fmt: skip


class Quiet:
    """The same examples each time, at most as many as in `make test`, and none shrunk."""

    def pytest_configure(self, config):
        from hypothesis import Phase, settings

        settings.register_profile(
            "mutation", parent=settings.default, max_examples=25, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        settings.load_profile("mutation")

    pytest_configure.trylast = True


class First:
    """The first test that fails, or file that cannot be collected."""

    def __init__(self):
        self.killer, self.passed = "", 0

    def pytest_collectreport(self, report):
        if report.failed:
            self.killer = self.killer or f"{report.nodeid} (import)"

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.killer = self.killer or report.nodeid
        elif report.when == "call" and report.passed:
            self.passed += 1


NOT_FOUND = 4
"""pytest's exit code where a test has another name by now, or another of its parameters."""


def judge(batches: list[list[str]], answer: Path) -> int:
    """Runs one batch of tests after the other. Writes who noticed, and how many passed before."""
    passed, code = 0, 0
    for batch in batches:
        first, code = _run(batch)
        if code == NOT_FOUND and not first.killer:
            first, code = _run(sorted({test.split("[")[0] for test in batch}))
        passed += first.passed
        if code == 3 and not first.killer:
            first.killer = f"{batch[0]} (conftest)"
        if first.killer:
            break
    answer.write_text(json.dumps({"killer": first.killer, "passed": passed, "code": code}))
    return 0


def _run(tests: list[str]) -> tuple[First, int]:
    import pytest

    first = First()
    return first, int(pytest.main([*OPTIONS, *tests], plugins=[first, Quiet()]))
