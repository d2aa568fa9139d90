"""The files that others' machines read: they parse, name what exists, and repeat no version that has moved on."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def steps(workflow: dict) -> list[str]:
    """The commands of all jobs."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_ci_runs_what_a_change_must_pass_on_every_python_that_is_promised():
    ci = read(".github/workflows/ci.yml")
    assert ".ci/run" in steps(ci)
    tested = [version for job in ci["jobs"].values() for version in job["strategy"]["matrix"]["python"]]
    assert tested.count("3.10") == 1
    assert sorted(tested, key=lambda version: int(version.split(".")[1])) == re.findall(r":: (3\.\d+)\"", PROJECT)


def test_workflows_name_files_that_exist():
    commands = [
        command for path in ROOT.glob(".github/workflows/*.yml") for command in steps(yaml.safe_load(path.read_text()))
    ]
    named = {word for x in commands for word in shlex.split(x) if re.fullmatch(r"\.ci/\S+|tests/\S+|\S+\.txt", word)}
    assert {".ci/run", "constraints.txt"} < named
    assert [word for word in sorted(named) if not (ROOT / word).exists()] == []


def test_the_gpu_job_waits_for_a_gpu_and_for_somebody_to_start_it():
    gpu = read(".github/workflows/gpu.yml")
    assert list(gpu[True]) == ["workflow_dispatch"]  # YAML 1.1 reads the key `on` as true
    (job,) = gpu["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    assert [shlex.split(command)[1:] for command in steps(gpu)[-2:]] == [
        ["-m", "pytest", "-m", "gpu"],
        ["-m", "benchmarks", "--quick"],
    ]


def test_hooks_use_the_ruff_of_the_constraints():
    repositories = {repo["repo"].rpartition("/")[2]: repo for repo in read(".pre-commit-config.yaml")["repos"]}
    ruff = repositories["ruff-pre-commit"]
    assert ruff["rev"] == f"v{CONSTRAINTS['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("name", ["bug", "feature", "method"])
def test_a_form_asks_for_something(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_command_of_the_bug_form_prints_the_versions():
    (versions,) = (x for x in read(".github/ISSUE_TEMPLATE/bug.yml")["body"] if x["id"] == "versions")
    (command,) = re.findall(r"```\n(.*?)\n```", versions["attributes"]["description"], re.DOTALL)
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"Python {sys.version.split()[0]}" in done.stdout
    assert re.search(r"\btorch==\d", done.stdout)
    assert re.search(r"\bnumpy==\d", done.stdout)
