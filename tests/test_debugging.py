"""docs/debugging.md: its runs log what the trainer logs, its figure, tables and thresholds are those of the CSV."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("trl")

import processes
from examples.debugging import page, runs
from processes import ROOT

TEXT = " ".join(page.PAGE.read_text().split())


@pytest.fixture(scope="module")
def rows():
    return page.read(page.FOLDER)


def test_tables_are_those_of_the_csv(rows):
    for name, text in {"numbers": page.numbers(rows), "made": page.made(page.FOLDER, rows)}.items():
        assert (page.FOLDER / f"{name}.md").read_text().strip() == text
        assert text in page.PAGE.read_text(), "run python -m examples.debugging --report"
    assert (page.FOLDER / "figure.png").stat().st_size > 10_000
    made = json.loads((page.FOLDER / "machine.json").read_text())
    assert made["commit"] in TEXT
    assert made["seconds"] <= 180  # of one core, as it was run


def test_every_run_reads_as_what_it_is(rows):
    """The rules of the page, on each run alone."""
    for name in runs.WAYS:
        for seed in page.seeds(rows):
            assert page.diagnose(page.of(rows, name, seed)) == name, (name, seed)


def test_the_thresholds_of_the_page_are_those_of_the_rules():
    assert f"`logps/chosen` falls by more than {page.FALL:.0f} nats" in TEXT
    assert f"moment `napo/q` stays above {page.NOISY_Q}" in TEXT
    assert f"`eval_napo/q` is above `napo/q` by more than {page.UNSEEN_Q}" in TEXT
    assert f"moment `napo/q` is below {page.LEARNED_Q}, on both" in TEXT
    ways = runs.WAYS
    assert f"with {100 * ways['noisy'].swapped:.0f} % of the pairs swapped" in TEXT
    assert ways["noisy"].swapped == ways["memorising"].swapped == 0.3
    assert ways["diverging"].learning_rate == pytest.approx(30 * ways["healthy"].learning_rate)


def test_the_sentences_of_the_page(rows):
    def at_end(name, key):
        return page.end(page.of(rows, name), key)

    for seed in page.seeds(rows):
        for name in runs.WAYS:
            mine = page.of(rows, name, seed)
            released, moment = (page.logged(mine, f"napo/q/{negative}") for negative in ("question_only", "rejected"))
            assert released[-1] < 0.5 < released[0] or name == "diverging", name  # it reads progress
            assert moment[0] > page.NOISY_Q, name  # it starts high
    margins = {name: at_end(name, "rewards/margins/rejected") for name in runs.WAYS}
    assert max(margins, key=margins.__getitem__) == "diverging"
    # Memorised: an estimate as of clean pairs, margins positive, and another estimate on held-out pairs.
    assert abs(at_end("memorising", "napo/q/rejected") - at_end("healthy", "napo/q/rejected")) < 0.15
    assert at_end("memorising", "rewards/accuracies/rejected") > 0.9
    assert at_end("memorising", "eval_napo/q/rejected") > page.NOISY_Q
    assert at_end("noisy", "napo/weight/rejected") < 0.25 < at_end("healthy", "napo/weight/rejected")


def test_columns_are_what_the_trainer_logs():
    import torch

    from napo_loss import SequenceLogps, napo_loss
    from napo_loss.trl import metrics

    logps = SequenceLogps(torch.zeros(2), torch.ones(2))
    negatives = SequenceLogps(torch.zeros(2, 2), torch.ones(2, 2))
    logged = metrics.of_pairs(napo_loss(logps, negatives, None, None), logps, negatives, list(runs.NAMES))
    assert {*runs.LOGGED} <= {*logged, "loss", "grad_norm"}
    assert {name.removeprefix("eval_") for name in runs.EVALUATED} <= {*logged}


@pytest.mark.slow
def test_the_command_trains_and_writes(tmp_path):
    command = [sys.executable, "-m", "examples.debugging", "--seeds", "1", "--steps", "8", "--out", tmp_path]
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = page.read(Path(tmp_path))
    assert {row["run"] for row in rows} == set(runs.WAYS)
    last = [row for row in page.of(rows, "noisy") if row["step"] == 8]
    assert all(page.logged(last, name) for name in runs.LOGGED)
    assert (tmp_path / "figure.png").exists()
