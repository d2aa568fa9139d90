"""The demo: a smoke run offline, its settings are an interior optimum, and page and README say what it found."""

import json
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import processes
from processes import ROOT

pytest.importorskip("trl")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples.demo import arms, digits, report, tune

RESULTS = ROOT / "examples/results"
PAGE = (ROOT / "docs/demo.md").read_text()


@pytest.fixture(scope="module")
def found():
    return report.Report.read(RESULTS / "demo.json")


@pytest.mark.slow
def test_quick_demo(tmp_path):
    command = [sys.executable, "-m", "examples.demo", "--quick", "--out", tmp_path]
    run = processes.run(command, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    made = report.Report.read(tmp_path / "demo.json")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert len(made.seeds) == 2
    for seed in made.seeds:
        for name, column in product(arms.CONFIGS, report.COLUMNS):
            assert name in run.stdout
            assert all(0 <= seed["arms"][name][f"{rate:g}"]["end"][column] <= 1 for rate in arms.QUICK.swapped)
        q = seed["arms"]["RELEASED"]["0.3"]["q"]
        assert all(0 < point["image_only"] <= 1 and point["rejected"] == 0 for point in q)


def test_a_report_of_one_seed(found, tmp_path):
    report.write(tmp_path, found._replace(seeds=found.seeds[:1]))
    text = (tmp_path / "demo.md").read_text()
    assert "1 seeds" in text
    assert "nan" not in text
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_results_in_the_repository_are_of_this_demo(found):
    """Settings that change without a new run would leave the table of docs/demo.md behind."""
    assert found.scale == arms.SCALE
    assert found.arms == arms.chosen()
    text = f"{report.markdown(found)}\n\n{report.made(found)}"
    assert (RESULTS / "demo.md").read_text().strip() == text
    assert text in PAGE, "run python -m examples.demo --seeds 10 --out examples/results"
    assert (RESULTS / "demo.png").stat().st_size > 10_000


def test_settings_are_an_interior_optimum_of_one_grid():
    tuned = json.loads((RESULTS / "demo-tuning.json").read_text())
    points = {name: {} for name in arms.CONFIGS}
    for x in tuned["validation"]:
        points[x["arm"]][x["beta"], x["learning_rate"]] = x["overall"]
    grids = [sorted(found) for found in points.values()]
    assert all(grid == grids[0] for grid in grids)
    betas, rates = (sorted(set(axis)) for axis in zip(*grids[0], strict=True))
    assert grids[0] == sorted(product(betas, rates))
    for name, (beta, rate) in tune.best(points).items():
        assert tuned["chosen"][name] == {"beta": beta, "learning_rate": rate}
        assert betas[0] < beta < betas[-1] or len(betas) >= tune.LARGEST, name
        assert rates[0] < rate < rates[-1] or len(rates) >= tune.LARGEST, name


def test_a_grid_grows_where_its_edge_was_chosen():
    assert tune.grown([0.3, 1.0, 3.0], {1.0}) == [0.3, 1.0, 3.0]
    assert tune.grown([0.3, 1.0, 3.0], {3.0, 1.0}) == [0.3, 1.0, 3.0, 9.0]
    assert tune.grown([1e-4, 2e-4, 4e-4], {1e-4, 4e-4}) == [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]
    assert tune.grown([1.0] * tune.LARGEST, {1.0}) == [1.0] * tune.LARGEST


def test_seeds_of_the_demo_are_not_those_it_was_tuned_on(found):
    assert not {seed["seed"] for seed in found.seeds} & set(tune.SEEDS)


def test_no_scan_is_in_two_splits():
    scans = np.concatenate(list(digits.splits().values()))
    assert len(set(scans.tolist())) == len(scans) == len(digits.scans()[1])


def test_the_right_answers_are_what_the_picture_shows():
    labels = digits.scans()[1]
    asked = digits.held_out("validation", 20)
    for kind, examples in asked.items():
        for x in examples:
            shown = tuple(int(labels[i]) for i in x.scans)
            assert x.answer == (shown[::-1] if kind == "back" else shown)
    assert all(x.answer == digits.FAVOURITES[i % 10] for i, x in enumerate(asked["aligned"]))
    assert all(x.answer != digits.FAVOURITES[i % 10] for i, x in enumerate(asked["conflict"]))


def test_an_answer_is_scored_by_digits_at_their_place():
    x = digits.Example(None, digits.THESE, (1, 2, 3))
    said = [digits.spoken((1, 2, 3)), digits.spoken((1, 3, 2)), "the digits are one", "one two three four", ""]
    assert digits.right(said, [x] * 5).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1, 0])


def test_differences_are_paired_by_seed(found):
    for rate, arm in product(found.scale.swapped, arms.CONFIGS):
        by_hand = np.mean([
            s["arms"][arm][f"{rate:g}"]["end"]["overall"] - s["arms"]["DPO"][f"{rate:g}"]["end"]["overall"]
            for s in found.seeds
        ])  # fmt: skip
        assert found.difference("overall", rate, arm).mean == pytest.approx(by_hand)


def test_the_estimate_tells_noisy_from_clean_in_every_seed(found):
    for seed in found.seeds:
        clean, noisy = ([x["rejected"] for x in seed["arms"]["moment q"][rate]["q"]] for rate in ("0", "0.3"))
        assert all(high > low for high, low in zip(noisy, clean, strict=True))


@pytest.mark.parametrize(
    "text",
    [PAGE.partition("## What it shows")[2], (ROOT / "README.md").read_text().partition("`make demo`,")[2]],
    ids=["page", "README"],
)
def test_numbers_in_the_text_are_those_of_the_table(text):
    """Every ± of the sentences stands in the table."""
    numbers = re.findall(r"[+−]\d+\.\d ± \d+\.\d", text)
    assert numbers
    table = Path(RESULTS / "demo.md").read_text()
    assert [x for x in numbers if x not in table] == []
