"""The page of versions is what the sessions left; what they run, and the workflow that repeats them, agree."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import version_table

ROOT = Path(__file__).parent.parent
NOX = ast.parse((ROOT / "noxfile.py").read_text())
FOUND = version_table.sessions()


def constant(name: str) -> ast.expr:
    (value,) = (
        x.value for x in NOX.body if isinstance(x, ast.Assign) and [ast.unparse(t) for t in x.targets] == [name]
    )
    return value


def declared() -> dict[str, dict]:
    """The sessions of noxfile.py, which is read and not imported: nox is no part of the test extra."""
    names = ["python", "torch", "triton", "extras"]
    return {
        ast.literal_eval(call.keywords[0].value): dict(zip(names, map(ast.literal_eval, call.args), strict=True))
        for call in constant("VERSIONS").elts
    }


def test_the_page_is_what_the_sessions_left():
    page = version_table.PAGE.read_text()
    assert version_table.written(page, FOUND) == page, "python tests/version_table.py"


def test_the_rows_are_of_the_sessions_and_nothing_failed():
    """A session that has no row was not run yet, which the page says."""
    wanted = {(s["python"], s["torch"], s["extras"] is not None) for s in declared().values()}
    ran = {(x["python"].rpartition(".")[0], x["torch"].split("+")[0], x["trl"] is not None) for x in FOUND}
    assert len(ran) == len(FOUND)
    assert ran <= wanted
    assert [x["failed"] for x in FOUND] == [[]] * len(FOUND)
    core, extras = (ast.literal_eval(constant(name)).split() for name in ("CORE", "EXTRAS"))
    for x in FOUND:
        assert x["files"] == core + (extras if x["trl"] else [])
        assert x["passed"] > 300


def test_the_files_of_a_session_exist():
    for name in (ast.literal_eval(constant("CORE")) + " " + ast.literal_eval(constant("EXTRAS"))).split():
        assert (ROOT / f"tests/test_{name}.py").exists(), name


def test_what_is_promised_was_run():
    """The oldest torch and Python of pyproject.toml, and the versions of constraints.txt."""
    project, constraints = ((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    sessions = declared().values()
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert min(tuple(map(int, s["torch"].split(".")[:2])) for s in sessions) == tuple(map(int, oldest.split(".")))
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    assert python in {s["python"] for s in sessions}
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", constraints, re.M))
    assert (pinned["torch"], pinned["triton"]) in {(s["torch"], s["triton"]) for s in sessions}


def test_the_workflow_repeats_the_sessions():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())["jobs"].values()
    assert [f"torch-{x}" for x in job["strategy"]["matrix"]["torch"]] == list(declared())
    (setup,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert {s["python"] for s in declared().values()} <= set(setup["python-version"].split())
    assert any("nox -s" in step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("failed", [[], ["tests.test_ops::test_x"]])
def test_a_table_tells_what_failed_and_why_tests_were_skipped(failed):
    one = dict.fromkeys(version_table.COLUMNS, "1.2.3") | {"trl": None, "date": "2026-01-02", "system": "Linux"}
    one |= {"passed": 7, "failed": failed, "skipped": {"no extra": 2}, "files": ["ops", "logps"]}
    text = version_table.table([json.loads(json.dumps(one))])
    assert f"| 1.2.3 | 1.2.3 | 1.2.3 | 1.2.3 | — | 1.2.3 | 1.2.3 | 7 | {len(failed)} | 2 |" in text
    assert "`ops`, `logps`. Skipped: 2 × no extra." in text
