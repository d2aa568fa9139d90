"""The demo at its toy scale: it runs offline, writes what it promises, and prints every arm."""

import json
import sys

import pytest

import processes
from processes import ROOT

for package in ("trl", "sklearn", "matplotlib"):
    pytest.importorskip(package)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_quick_demo(seeds, tmp_path):
    command = [sys.executable, ROOT / "examples/demo.py", "--quick", "--seeds", seeds, "--out", tmp_path]
    run = processes.run(command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert len(report["seeds"]) == seeds
    for arm in ("pre-trained", "DPO", "DPO, all negatives", "NaPO"):
        assert 0 <= report["summary"]["final"][arm]["conflict"]["mean"] <= 1
        assert arm in run.stdout
    for seed in report["seeds"]:
        starts = [arm["curve"][0] for arm in seed["arms"].values()]
        assert starts == [starts[0]] * len(starts)  # same model for every arm
        q = seed["arms"]["NaPO"]["q"]
        assert all(0 < point["image_only"] <= 1 and point["rejected"] == 0 for point in q)


@pytest.mark.slow
def test_results_in_the_repository_are_of_this_demo():
    """Settings that change without a new run would leave the table of docs/demo.md behind."""
    results = ROOT / "examples/results/demo.json"
    if not results.exists():
        pytest.skip("no results committed")
    code = (
        "import sys, json, dataclasses; sys.path.insert(0, 'examples'); import demo; from demo_arms import *\n"
        "print(json.dumps([dataclasses.asdict(SCALE), {a.name: dataclasses.asdict(a) for a in ARMS}]))"
    )
    run = processes.run([sys.executable, "-c", code])
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(results.read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == [report["scale"], report["arms"]]
