"""The study: its plan, its CSV, what is counted from it, and that its page and README say what it found."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torch

import processes
from examples.noise_study import findings, page, plan, results
from examples.noise_study.losses import GROUPS, LOSSES, State
from examples.noise_study.training import Run
from processes import ROOT

FOLDER = results.FOLDER


@pytest.fixture(scope="module")
def rows():
    return results.read(FOLDER / "runs.csv")


def test_the_study_is_as_large_as_it_says(rows):
    assert len({row["seed"] for row in rows}) >= 10
    assert len({row["loss"] for row in rows}) >= 6
    assert len({row["rate"] for row in rows}) >= 3
    whole = findings.converged(findings.where(rows, task="pictures", noise="swapped"))
    for loss in LOSSES:
        for rate in plan.RATES:
            assert len(findings.where(whole, loss=loss, rate=rate)) >= 10, (loss, rate)


@pytest.mark.parametrize("name", page.TABLES)
def test_tables_are_those_of_the_csv_and_of_the_page(rows, name):
    table = page.TABLES[name](rows)
    assert (FOLDER / f"{name}.md").read_text().strip() == table
    assert table in page.PAGE.read_text(), "run python -m examples.noise_study --report"


def test_figures_are_there():
    for name in ("by_rate", "maps", "estimators"):
        assert (FOLDER / f"{name}.png").stat().st_size > 10_000
        assert f"noise_study/{name}.png" in page.PAGE.read_text()
    sitting = json.loads((FOLDER / "machine.json").read_text())[-1]
    assert sitting["cpu"] in page.PAGE.read_text()
    assert sitting["commit"] in page.PAGE.read_text()


def test_every_loss_trains_both_ways_of_a_pair():
    policy = torch.tensor([[-9.0, -8.0, -7.0], [-8.0, -8.2, -7.3], [-7.0, -7.0, -9.0]]).requires_grad_()
    for name, loss in (LOSSES | GROUPS).items():
        state = State(beta=1.0, swap_rate=0.2, lengths=torch.full((3, 3), 9))
        losses, _ = loss(policy, torch.full((3, 3), -8.0), state)
        assert losses.shape == (3,), name
        (grad,) = torch.autograd.grad(losses.mean(), policy)
        assert (grad[0] < 0).sum() >= 2, name  # of a smaller loss the chosen are likelier
        assert grad.isfinite().all(), name


def test_dpo_kin_at_no_noise_are_dpo():
    policy, state = torch.tensor([[-9.0, -8.0], [-8.0, -9.0]]), State(beta=0.5, swap_rate=0.0)
    expected = LOSSES["DPO"](policy, torch.zeros(2, 2), state)[0]
    for name in ("cDPO", "rDPO"):
        torch.testing.assert_close(LOSSES[name](policy, torch.zeros(2, 2), state)[0], expected)


def test_intervals_and_paired_differences():
    made = [{"seed": s, "test": 0.5 + 0.1 * s, "beta": 1, "learning_rate": 1, "epoch": 1, "valid": s} for s in range(4)]
    better = [{**row, "test": row["test"] + 0.02 * (1 + row["seed"] % 2)} for row in made]
    mean, half, seeds = findings.difference(better, made)
    assert (round(mean, 6), seeds) == (0.03, 4)
    assert round(half, 4) == round(3.1824 * 0.0115470 / 2, 4)  # t of 3 degrees of freedom times the standard error
    assert findings.difference(better, made).signed == "+3.0 ± 1.8"
    assert findings.difference(better[:1], made[:1]).signed == "+2.0"


def test_validation_chooses_and_the_test_reports():
    rows = [
        {"beta": b, "learning_rate": 1.0, "epoch": e, "seed": s, "valid": valid, "test": test}
        for (b, e, valid, test) in [(1, 1, 0.5, 0.9), (1, 2, 0.7, 0.6), (3, 1, 0.6, 0.8)]
        for s in range(3)
    ]
    lucky = {"beta": 9, "learning_rate": 1.0, "epoch": 1, "seed": 0, "valid": 1.0, "test": 1.0}
    point, best = findings.own_best([*rows, lucky])
    assert point == (1, 1.0, 2)
    assert {row["test"] for row in best} == {0.6}


def test_a_torn_file_goes_on_where_it_was(tmp_path):
    run, path = Run("pictures", "swapped", 0.3, "DPO", 1.0, 1e-4, 0), tmp_path / "runs.csv"
    row = dict.fromkeys(results.MEASURED, 0.25)
    results.rewrite(path, [])
    results.append(path, run, [{**row, "epoch": e} for e in run.epochs])
    counts = results.done(results.read(path))
    assert counts == {run.key: len(run.epochs)}
    text = path.read_text()
    path.write_text(text[:-9])
    assert sum(results.done(results.read(path)).values()) == len(run.epochs) - 1


def test_no_run_is_planned_twice_under_two_names():
    runs = list(plan.plan(range(2)))
    assert len({run.key for run in runs}) == len(set(runs))
    assert {run.loss for run in runs} == set(LOSSES) | set(GROUPS)


def test_the_page_says_what_the_map_shows(rows):
    text = page.PAGE.read_text().partition("**A wider peak")[2].partition("##")[0]
    swapped = findings.walked(findings.where(rows, task="pictures", noise="swapped", rate=0.3, learning_rate=plan.RATE))
    for loss, name in (("DPO", "DPO is"), ("moment", "the moment estimate"), ("q = 1", "q = 1")):
        _, found = findings.curve(findings.where(swapped, loss=loss, beta=3.0), "test")
        low, high = min(e.mean for e in found), max(e.mean for e in found)
        assert f"{name} at {100 * low:.0f} to {100 * high:.0f} %" in " ".join(text.split())
    assert {row["seed"] for row in swapped} == set(range(plan.AXES_SEEDS))


@pytest.mark.slow
def test_quick_study_runs_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "examples.noise_study", "--quick", "--out", tmp_path]
    first = processes.run(command, cwd=ROOT)
    assert first.returncode == 0, first.stderr[-3000:]
    rows = (tmp_path / "runs.csv").read_text()
    again = processes.run(command, cwd=ROOT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "runs.csv").read_text() == rows
    assert len(json.loads((tmp_path / "machine.json").read_text())) == 1  # nothing was left to do


def test_readme_says_what_the_study_found():
    readme = Path(ROOT, "README.md").read_text().partition("## Does it work?")[2]
    table = (FOLDER / "converged.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): [c.strip(" |") for c in line.split(" | ")] for line in table[2:]}
    column = {"0": 1, "30": 4}
    for loss in ("moment", "released"):
        for rate in column:
            assert cells[loss][column[rate]] in readme, (loss, rate)
