"""Beside which TRL the trainer runs, and what it says beside another.

The trainer's tests run beside any TRL that it takes. In an environment that has one of them, torch and PEFT:
``python -m pytest tests/test_trl*.py``
"""

import inspect
import re
import runpy
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from trl import DPOTrainer

import napo_loss.trl
from napo_loss.trl import NaPOTrainer, versions
from napo_loss.trl.passes import OneHead
from trainers import QUIET, TRL, trainer_for

pytestmark = QUIET
ROOM = Path(napo_loss.trl.__file__).parent


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ImportError, match=r'pip install "napo-loss\[trl\]"'):
        runpy.run_path(napo_loss.trl.__file__)


@pytest.mark.parametrize("found", ["0.24.0", "0.28.2", "0.9"])
def test_beside_an_older_trl_both_versions_are_named(found, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: found)
    with pytest.raises(
        ImportError, match=rf"needs TRL 0\.29\.1 or newer: found TRL {found}; napo_loss.trl was tried with"
    ):
        runpy.run_path(napo_loss.trl.__file__)


@pytest.mark.parametrize("found", ["0.29.0", "0.29.1", "1.9.0", "1.16.0", "1.16.0rc1", "1.20.1.dev0", "2.0.0"])
def test_beside_a_newer_trl_it_imports_if_the_methods_are_there(found, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: found)
    assert "NaPOTrainer" in runpy.run_path(napo_loss.trl.__file__)


class Renamed(DPOTrainer):
    _prepare_dataset = None  # as good as gone


class OtherArguments(DPOTrainer):
    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        raise NotImplementedError


class MoreArguments(DPOTrainer):
    def _save_checkpoint(self, model, trial, metrics):
        raise NotImplementedError


class Wider(DPOTrainer):
    """What other libraries put in the place of these methods, and what a later TRL may add."""

    def get_batch_samples(self, epoch_iterator, num_batches, device=None, *args, **kwargs):
        raise NotImplementedError

    def _save_checkpoint(self, model, trial, metrics=None):
        raise NotImplementedError

    def compute_loss(self, *args, **kwargs):
        raise NotImplementedError


def test_methods_that_changed_are_named_with_both_versions():
    tried = re.escape("found TRL 3.1; napo_loss.trl was tried with 0.29.1, 1.9.0, 1.14.1, 1.15.0, 1.16.0")
    for trainer, message in (
        (Renamed, r"DPOTrainer\._prepare_dataset\(dataset, processing_class, args, dataset_name\), which is not there"),
        (OtherArguments, r"DPOTrainer\.compute_loss\(model, inputs, .*\), which takes \['model', 'batch', .*\] there"),
        (MoreArguments, r"DPOTrainer\._save_checkpoint\(model, trial\), which takes .*'metrics'\] there"),
    ):
        with pytest.raises(ImportError, match=f"NaPOTrainer needs {message}: {tried}"):
            versions.check_methods(trainer, "3.1")
    versions.check_methods(Wider, "3.1")
    versions.check_methods(DPOTrainer, str(TRL))


def test_attributes_that_are_gone_are_named(tmp_path):
    trainer = trainer_for("text", tmp_path)
    versions.check_attributes(trainer, str(TRL))
    del trainer._metrics
    with pytest.raises(
        RuntimeError, match=r"NaPOTrainer needs DPOTrainer\._metrics, which is not there: found TRL 3\.1"
    ):
        versions.check_attributes(trainer, "3.1")


def test_the_list_of_methods_is_whole():
    """Every method that the trainer overrides, and every one with an underscore that it calls, is checked."""
    ours = {**vars(OneHead), **vars(NaPOTrainer)}
    own = {name for name, x in ours.items() if inspect.isfunction(x) and hasattr(DPOTrainer, name)}
    source = "\n".join(file.read_text() for file in ROOM.glob("*.py"))
    called = set(re.findall(r"(?:self|trainer|super\(\))\.(_[a-z]\w+)\(", source))
    theirs = {name for name in called if hasattr(DPOTrainer, name)}
    assert (own | theirs) - {"__init__"} == set(versions.METHODS)


def test_the_page_names_the_versions_that_were_tried():
    page = (ROOM.parent.parent / "docs/trainers.md").read_text()
    assert f"| TRL {', '.join(versions.TRIED)} |" in page


def test_nothing_private_is_imported():
    for file in ROOM.glob("*.py"):
        for line in re.findall(
            r"^ *(?:from|import) (?:trl|transformers|accelerate|datasets).*", file.read_text(), re.M
        ):
            assert not re.search(r"[ .,(]_\w", line), f"{file.name}: {line}"
