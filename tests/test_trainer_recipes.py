"""docs/trainers.md: its table is what `make test-trainers` found, which can say no; and recipes that it cannot run.

These are called as the source of the version named calls them, with a stand-in for its class.
"""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

from napo_loss import NaPOLoss, Negative, Recipe, napo_loss, noise_level, reference
from trainer_recipes import __main__ as runner
from trainer_recipes import judge, page

REQUIREMENTS = runner.HERE / "requirements"


def test_the_table_on_the_page_is_the_committed_one_of_all_trainers():
    assert f"\n\n{runner.TABLE.read_text().strip()}\n\n" in page.PAGE.read_text()
    expected = {(name, recipe) for name, trainer in runner.TRAINERS.items() for recipe in trainer.recipes}
    assert set(judge.rows_of(runner.TABLE)) == expected


@pytest.mark.parametrize("name", runner.TRAINERS)
def test_requirements_are_pinned(name):
    lines = (REQUIREMENTS / f"{name}.txt").read_text().split()
    assert sum(line.startswith("torch==") for line in lines) == 1
    assert [line for line in lines if "==" not in line and not line.startswith("-")] == []
    assert (runner.HERE / f"{runner.TRAINERS[name].module}.py").exists()


def test_the_weekly_job_tries_every_trainer():
    workflow = yaml.safe_load((page.ROOT / ".github/workflows/trainers.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["trainer"] == list(runner.TRAINERS)
    assert job["strategy"]["fail-fast"] is False
    assert "schedule" in workflow[True]  # YAML 1.1 reads the key `on` as true


def reports(folder, **changes):
    """What two ranks of a good run write, with one thing changed on the second."""
    for rank in range(2):
        q = 2 / (1 + math.exp(0.01 * 2.5))
        calls = [{"q": [1.0], "own": [0.0]}, {"q": [q], "own": [2.0 + rank]}]
        runs = {"theirs": {"losses": [0.69, 0.6]}, "q0": {"losses": [0.69, 0.6]}}
        runs["ours"] = {"losses": [0.5, 0.4], "calls": calls, "moved": 0.1}
        if rank == 1:
            for path, value in changes.items():
                *way, last = path.split("_")
                inner = runs
                for key in way:
                    inner = inner[int(key) if key.isdigit() else key]
                inner[last] = value
        (folder / f"it-{rank}.json").write_text(json.dumps({"versions": {"torch": "2", "it": "1"}, "runs": runs}))


def test_a_good_run_is_a_line_of_the_table(tmp_path):
    reports(tmp_path)
    line = judge.judge(tmp_path, "it").line("an environment")
    assert line == "| an environment | it | it 1 | – | 0.0e+00 | 0.9875 | 0.1 |"
    (tmp_path / "table.md").write_text("\n".join([*judge.HEAD, line]) + "\n")
    assert judge.rows_of(tmp_path / "table.md") == {("an environment", "it"): line}


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("q0_losses", [0.69, 0.61], "from the trainer's own"),
        ("q0_losses", [0.69], "took other steps"),
        ("theirs_losses", [0.6, 0.6], "never changed"),
        ("ours_moved", 0.0, "did not move"),
        ("ours_calls", [], "was not called"),
        ("ours_calls_1_q", [0.98], "different q"),
        ("ours_calls_1_own", [9.0], "of the margins of all ranks"),
    ],
)
def test_a_run_that_went_wrong_is_told_so(tmp_path, change, value, message):
    reports(tmp_path, **{change: value})
    with pytest.raises(AssertionError, match=message):
        judge.judge(tmp_path, "it")


def logps(n=4):
    g = torch.Generator().manual_seed(0)
    return [(-30 * torch.rand(n, generator=g)).requires_grad_(i < 2) for i in range(4)]


def stand_in(monkeypatch, module: str, **given):
    """A module of this name with these classes, and those that lead to it."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[module]).update(given)


class OpenRLHFs:
    """openrlhf 0.11.2, trainer/dpo_trainer.py: ``loss_fn`` is called with four sums, its first output is what backward
    starts from, and rewards are compared."""

    def __init__(self):
        self.loss_fn = SimpleNamespace(beta=0.1)

    def fit(self, args, consumed_samples=0, num_update_steps_per_epoch=None):
        four = logps()
        loss, chosen_reward, reject_reward = self.loss_fn(*four)
        loss.backward()
        return loss, (chosen_reward > reject_reward).float().mean().item(), four


def test_openrlhf(monkeypatch):
    stand_in(monkeypatch, "openrlhf.trainer.dpo_trainer", DPOTrainer=OpenRLHFs)
    trainer = page.names(page.code("OpenRLHF"))["Trainer"]()
    found = OpenRLHFs.fit
    monkeypatch.setattr(OpenRLHFs, "fit", lambda self, *args, **kwargs: setattr(self, "found", found(self, *args)))
    trainer.fit(SimpleNamespace())
    loss, accuracy, four = trainer.found
    expected = napo_loss(*logps(), beta=0.1)
    torch.testing.assert_close(loss, expected.losses.mean())
    assert 0 <= accuracy <= 1
    assert four[0].grad.abs().sum() > 0
    assert isinstance(trainer.loss_fn, NaPOLoss)


def test_axolotl_loads_the_class_that_its_config_names(monkeypatch):
    """axolotl 0.19.0, core/builders/rl.py: ``get_cls_from_module_str(cfg.trainer_cls)``, called with model and
    reference by position and ``args``, ``train_dataset``, ``callbacks`` and ``processing_class`` by name."""
    import inspect

    from trl import DPOTrainer

    config = yaml.safe_load(page.code("axolotl", languages="yaml"))
    stand_in(monkeypatch, "my_module", **page.names(page.code("A subclass for TRL")))
    for path in (config["trainer_cls"], "napo_loss.trl.NaPOTrainer"):
        module, _, name = path.rpartition(".")
        trainer = getattr(__import__(module, fromlist=[name]), name)
        assert issubclass(trainer, DPOTrainer)
        inspect.signature(trainer).bind("model", "reference", args=0, train_dataset=0, callbacks=[], processing_class=0)
    assert config["rl"] == "dpo"


def test_unsloth_comes_first(monkeypatch):
    """unsloth 2026.10.9, models/rl.py, puts a class of its own in the place of ``trl.DPOTrainer`` as it is imported."""
    import trl

    class Replaced(trl.DPOTrainer):
        pass

    stand_in(monkeypatch, "unsloth")
    monkeypatch.setattr(trl, "DPOTrainer", Replaced)
    stand_in(monkeypatch, "my_module", **page.names(page.code("A subclass for TRL")))
    assert issubclass(page.names(page.code("unsloth"))["Trainer"], Replaced)


class NeMosDPOLossFn:
    """NeMo-RL, nemo_rl/algorithms/loss_functions.py: rewards ``[2·B]``, chosen and rejected in turn, and the mask too;
    four means over ``global_valid_seqs / 2`` pairs."""


def nemos(rewards, sample_mask, global_valid_seqs, beta):
    """Its contract with the sigmoid loss, in float64."""
    chosen, rejected, mask = rewards[::2].double(), rewards[1::2].double(), sample_mask[::2].double()
    losses = reference.noise_aware_dpo_loss(chosen - rejected, beta, 0.0)
    return [(x * mask).sum() / (global_valid_seqs / 2) for x in (losses, (chosen > rejected), chosen, rejected)]


def test_nemo_rl(monkeypatch):
    stand_in(monkeypatch, "nemo_rl.algorithms.loss_functions", DPOLossFn=NeMosDPOLossFn)
    found = page.names(page.code("NeMo-RL"), page.code("NeMo-RL", 1))
    assert NeMosDPOLossFn._preference_loss is found["preference_loss"]
    rewards = torch.tensor([3.0, 1.0, 200.0, -200.0, -2.0, 1.0], requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    seen = []
    settings = {"recipe": Recipe(Negative(q=0.0))}

    def watched(*logps, **given):
        seen.append(napo_loss(*logps, **{**given, **settings}))
        return seen[-1]

    found["napo_loss"] = watched
    ours = NeMosDPOLossFn()._preference_loss(rewards, mask, torch.tensor(4.0), beta=0.5)
    for one, other in zip(ours, nemos(rewards, mask, torch.tensor(4.0), 0.5), strict=True):
        torch.testing.assert_close(one.double(), other)
    settings.clear()
    ours = NeMosDPOLossFn()._preference_loss(rewards, mask, torch.tensor(4.0), beta=0.5)
    ours[0].backward()
    assert seen[-1].q == noise_level(torch.tensor([2.0, -3.0]))
    assert (rewards.grad[2:4] == 0).all()
    padded = noise_level(torch.tensor([0.0, 400.0])).item(), noise_level(torch.tensor([0.0])).item()
    assert f"q was {padded[0]:.3f}"[:-1] in page.section("NeMo-RL") or padded == (pytest.approx(0.238, abs=1e-3), 1.0)


def test_muffin():
    """muffin of the paper's release: ``dpo_loss(four log-probs, beta=…)``, whose losses it averages itself."""
    found = page.names(page.code("muffin"))["dpo_loss"]
    losses, chosen, rejected = found(*logps(), beta=0.1)
    expected = napo_loss(*logps(), beta=0.1)
    assert torch.equal(losses, expected.losses)
    assert torch.equal(chosen, expected.chosen_rewards)
    assert torch.equal(rejected, expected.rejected_rewards)


class SwiftsDPOTrainer:
    """ms-swift 4.6.0, rlhf_trainers/dpo_trainer.py: ``dpo_loss(chosen, rejected, ref_chosen, ref_rejected, loss_type,
    model_output)``, by position."""

    beta = 0.1


def test_ms_swift(monkeypatch):
    factory = SimpleNamespace(TRAINER_MAPPING={"dpo": "swift.rlhf_trainers.DPOTrainer"})
    stand_in(monkeypatch, "swift.rlhf_trainers", DPOTrainer=SwiftsDPOTrainer)
    monkeypatch.setitem(sys.modules, "swift.trainers", SimpleNamespace(TrainerFactory=factory))
    found = page.names(page.code("The hook"), page.code("ms-swift"))
    losses, *_ = found["Trainer"]().dpo_loss(*logps(), "sigmoid", {"chosen_logps": None})
    assert torch.equal(losses, napo_loss(*logps(), beta=0.1).losses)
    assert factory.TRAINER_MAPPING["dpo"] == "plugin.Trainer"


def test_several_negatives_through_one_column_are_those_of_the_function():
    found = page.names(page.code("Several negatives, one rejected column"), DPOTrainer=SwiftsDPOTrainer)
    four = logps(6)
    with torch.no_grad():
        for x in (four[0], four[2]):
            x[1::2] = x[::2]  # rows of a prompt have the same chosen
    losses, chosen, rejected = found["Trainer"]().dpo_loss(*four, "sigmoid", {})
    expected = napo_loss(four[0][::2], four[1].view(3, 2).T, four[2][::2], four[3].view(3, 2).T)
    torch.testing.assert_close(losses, expected.losses.repeat_interleave(2))
    torch.testing.assert_close(chosen, expected.chosen_rewards.repeat_interleave(2))
    torch.testing.assert_close(rejected, expected.rejected_rewards.T.flatten())
    losses.mean().backward()
    assert four[1].grad.abs().min() > 0
