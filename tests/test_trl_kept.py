"""Log-probs of the reference that are kept with the data: computed once, for images too, or brought by the dataset."""

import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

import tiny
from napo_loss.bias import read_released, write_released
from napo_loss.trl import NaPOConfig, NaPOTrainer
from napo_loss.trl import reference as kept_files
from napo_loss.trl.data import ReferenceLogps
from trainers import NAMES, QUIET, Recorded, arguments, logps_by_hand, moved, pairs, text_trainer, trainer_for

pytestmark = QUIET
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # does something from the start


def trainer_of(data, folder, *, kind="text", policy=None, ref=None, extra=None, cls=NaPOTrainer, **options):
    """Without a reference model, so that the policy is its own."""
    vision = kind == "vision"
    return cls(
        policy or (tiny.llava() if vision else tiny.llama()), ref, arguments(NaPOConfig, folder, **options),
        train_dataset=data, processing_class=tiny.processor() if vision else tiny.tokenizer(), **(extra or {}),
    )  # fmt: skip


def columns_of(trainer, names=NAMES):
    return np.array([trainer.train_dataset[f"ref_{name}_logps"] for name in ("chosen", *names)])


def data_of(kind, n=4):
    return tiny.vision_pairs(n) if kind == "vision" else pairs(range(n))


@pytest.fixture
def passes(monkeypatch):
    """Every batch that the reference computes."""
    seen, once = [], NaPOTrainer.reference_logps
    monkeypatch.setattr(NaPOTrainer, "reference_logps", lambda *a, **k: seen.append(1) or once(*a, **k))
    return seen


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("columns", [["rejected"], ["rejected", "image_only"], NAMES])
def test_precomputed_reference_is_the_reference(kind, columns, tmp_path, passes):
    data = data_of(kind)
    now = trainer_for(kind, tmp_path / "a", columns=columns)
    data = data.remove_columns([name for name in NAMES if name not in columns])
    model = tiny.llava() if kind == "vision" else tiny.llama()
    before = trainer_of(
        data, tmp_path / "b", kind=kind, policy=model, precompute_ref_log_probs=True, precompute_ref_batch_size=3,
        extra={"eval_dataset": data},
    )  # fmt: skip
    assert before.ref_model is None
    passes.clear()
    batch = next(iter(before.get_train_dataloader()))
    expected = logps_by_hand(now.ref_model, batch).sum
    torch.testing.assert_close(batch["reference_logps"].logps.double(), expected, rtol=1e-5, atol=1e-5)
    before.train()
    assert before.evaluate()["eval_loss"] > 0
    assert passes == []


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("options", [{}, {"peft_config": ADAPTER}])
def test_training_with_a_kept_reference_is_training_with_one(kind, options, tmp_path):
    found = []
    for kept in (False, True):
        torch.manual_seed(0)
        model = tiny.llava() if kind == "vision" else tiny.llama()
        trainer = trainer_of(
            data_of(kind), tmp_path, kind=kind, policy=model, extra=copy.deepcopy(options), cls=Recorded, max_steps=3,
            optim="sgd", precompute_ref_log_probs=kept, learning_rate=5.0,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.steps)
    assert abs(found[0][-1]["rewards/margins"]) > 1e-3
    for a, b in zip(*found, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name


def test_the_pass_shares_the_policys_weights(tmp_path, monkeypatch):
    model, seen = tiny.llama(), []
    once = NaPOTrainer.reference_logps
    monkeypatch.setattr(NaPOTrainer, "reference_logps", lambda self, x, m=None: seen.append(m) or once(self, x, m))
    trainer_of(pairs(), tmp_path, policy=model, precompute_ref_log_probs=True)
    assert seen[0] is not model
    assert {id(p) for p in seen[0].parameters()} == {id(p) for p in model.parameters()}


def test_a_model_by_its_name(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    named = trainer_of(pairs(), tmp_path, policy=str(tmp_path / "model"), precompute_ref_log_probs=True)
    assert named.ref_model is None
    np.testing.assert_allclose(
        columns_of(named), columns_of(trainer_of(pairs(), tmp_path, precompute_ref_log_probs=True)), rtol=1e-5
    )
    named.train()


def test_an_adapter_under_fsdp_is_refused(tmp_path, monkeypatch):
    args = arguments(NaPOConfig, tmp_path, precompute_ref_log_probs=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for policy, extra in ((tiny.llama(), {"peft_config": ADAPTER}), (get_peft_model(tiny.llama(), ADAPTER), {})):
        with pytest.raises(
            NotImplementedError, match=r"precompute_ref_log_probs=True with PEFT is not supported under FSDP"
        ):
            NaPOTrainer(policy, None, args, train_dataset=pairs(), processing_class=tiny.tokenizer(), **extra)


def saved(data, folder):
    data.save_to_disk(str(folder))
    return Dataset.load_from_disk(str(folder))


def test_files_are_found_by_column_and_by_all_that_shapes_them(tmp_path, passes):
    """Two batches a pass; what is known already is not computed again, and what has changed is."""
    data = saved(pairs(range(4)), tmp_path / "pairs")
    keep = {"precompute_ref_log_probs": True}

    def run(data=data, **kwargs):
        passes.clear()
        trainer = trainer_of(data, tmp_path, **{**keep, **kwargs})
        return len(passes), columns_of(trainer, trainer.negatives)

    first, whole = run()
    assert first == 2
    again, same = run()
    assert again == 0
    assert np.array_equal(whole, same)
    subset, fewer = run(negatives={"image_only": {}, "rejected": {}})
    assert subset == 0
    assert np.array_equal(fewer, whole[[0, 3, 1]])
    assert run(precompute_ref_batch_size=1, learning_rate=1.0, beta=0.5)[0] == 0  # these shape nothing
    assert run(data.remove_columns("question_only"))[0] == 0
    shorter, cut = run(max_length=5)
    assert shorter == 2
    assert not np.allclose(cut, whole)
    other, moved_away = run(policy=moved(tiny.llama()))
    assert other == 2
    assert not np.allclose(moved_away, whole)
    assert run(policy=moved(tiny.llama()))[0] == 0
    assert run(data.select([0, 1, 3]))[0] == 2
    assert run(data.select([0, 1, 3, 2]))[0] == 2
    assert run(bf16=True)[0] == 2
    assert run()[0] == 0


def test_files_of_images_follow_the_processor(tmp_path, passes):
    data = saved(tiny.vision_pairs(4), tmp_path / "pairs")

    def run(processor):
        passes.clear()
        args = arguments(NaPOConfig, tmp_path, precompute_ref_log_probs=True)
        NaPOTrainer(tiny.llava(), None, args, train_dataset=data, processing_class=processor)
        return len(passes)

    assert [run(tiny.processor()), run(tiny.processor())] == [2, 0]
    brighter = tiny.processor()
    brighter.image_processor.image_mean = [0.2, 0.2, 0.2]
    assert run(brighter) == 2
    terse = tiny.processor()
    terse.chat_template = tiny.CHAT.replace("{{ m['role'] }} ", "")
    assert run(terse) == 2
    assert run(tiny.processor()) == 0


def test_another_negative_costs_its_own_column(tmp_path, passes, monkeypatch):
    """The dataset is the same, images being tokenised as they are collated: only what is new is computed."""
    data = saved(tiny.vision_pairs(4), tmp_path / "pairs")
    rows = []
    once = NaPOTrainer.sequence_logps
    monkeypatch.setattr(
        NaPOTrainer, "sequence_logps", lambda self, m, x, **k: rows.append(len(x["input_ids"])) or once(self, m, x, **k)
    )
    keep = {"kind": "vision", "precompute_ref_log_probs": True}
    two = trainer_of(data, tmp_path, negatives={"rejected": {}, "image_only": {}}, **keep)
    assert rows == [6, 6]
    rows.clear()
    three = trainer_of(data, tmp_path, **keep)
    assert rows == [2, 2]
    assert np.array_equal(columns_of(two, ["rejected", "image_only"]), columns_of(three)[[0, 1, 3]])


def test_a_broken_file_is_computed_again_and_a_full_disk_is_said(tmp_path, passes, monkeypatch, caplog):
    data = saved(pairs(range(4)), tmp_path / "pairs")
    whole = columns_of(trainer_of(data, tmp_path, precompute_ref_log_probs=True))
    (file,) = (tmp_path / "pairs").glob("ref_chosen_logps-*.npy")
    for broken in (b"", file.read_bytes()[:-4]):
        file.write_bytes(broken)
        passes.clear()
        again = trainer_of(data, tmp_path, precompute_ref_log_probs=True)
        assert len(passes) == 2
        np.testing.assert_allclose(columns_of(again), whole, rtol=1e-5)
    np.save(file, np.zeros(3, dtype=np.float32))  # of other rows
    np.testing.assert_allclose(columns_of(trainer_of(data, tmp_path, precompute_ref_log_probs=True)), whole, rtol=1e-5)

    def full(*_):
        raise OSError("no space left on device")

    file.unlink()
    monkeypatch.setattr(kept_files.np, "save", full)
    with caplog.at_level(logging.WARNING):
        trainer_of(data, tmp_path, precompute_ref_log_probs=True)
    assert "reference log-probs are not kept for another run: no space left on device" in caplog.text


def test_columns_that_only_look_like_ours_are_left_alone(tmp_path):
    plain = text_trainer(tiny.text_pairs(4), tmp_path)
    data = tiny.text_pairs(4).add_column("doc_ids", list("abcd"))
    for name in ("chosen", "rejected"):
        data = data.add_column(f"ref_{name}_logps", [-5.0] * 4)  # of an earlier run with another model
    cluttered = text_trainer(data, tmp_path)
    batches = [next(iter(t.get_train_dataloader())) for t in (plain, cluttered)]
    assert set(batches[0]) == set(batches[1])
    losses = [t.compute_loss(t.model, b) for t, b in zip((plain, cluttered), batches, strict=True)]
    assert torch.equal(*losses)
    computed = text_trainer(data, tmp_path, precompute_ref_log_probs=True)
    assert max(computed.train_dataset["ref_chosen_logps"]) < -5


# Datasets handed to evaluate().


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_evaluation_on_further_datasets(kind, tmp_path, passes):
    held_out = {"a": data_of(kind, 2), "b": data_of(kind, 3)}
    trainer = trainer_of(data_of(kind), tmp_path, kind=kind, precompute_ref_log_probs=True, max_steps=1)
    known = trainer.train_dataset
    before = trainer.evaluate(held_out)
    assert before["eval_a_loss"] == pytest.approx(before["eval_b_loss"], abs=1e-4)  # margins are 0
    trainer.train()
    passes.clear()
    assert trainer.evaluate(known)["eval_loss"] > 0  # its log-probs are there
    assert passes == []
    with pytest.raises(
        ValueError, match=r"can no longer be computed: with precompute_ref_log_probs=True and no ref_model"
    ):
        trainer.evaluate(held_out)


def test_evaluation_where_there_is_a_reference(tmp_path):
    for ref, extra in ((tiny.llama(), {}), (None, {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])})):
        policy = tiny.llama() if extra else moved(tiny.llama())
        trainer = trainer_of(
            pairs(), tmp_path, policy=policy, ref=ref, extra=extra, precompute_ref_log_probs=True, max_steps=2,
            learning_rate=0.5, optim="sgd",
        )  # fmt: skip
        assert (trainer.ref_model is None) == (ref is None)
        trainer.train()
        other = pairs(range(8, 12))
        expected = trainer_of(other, tmp_path, policy=tiny.llama(), precompute_ref_log_probs=True).train_dataset
        kept = trainer.kept.of(other)
        np.testing.assert_allclose(kept["ref_image_only_logps"], expected["ref_image_only_logps"], rtol=1e-4)
        assert trainer.evaluate(other)["eval_loss"] > 0


# Log-probs that a dataset brings.


def released(folder):
    """The released parquet, as its reader gives it: log-probs of a model of somebody else's."""
    rows = []
    for i, row in enumerate(tiny.vision_pairs(4)):
        texts = {name: row[name][0]["content"] for name in ("chosen", *NAMES)}
        found = {"prompt": row["prompt"][0]["content"], "image": Image.fromarray(np.asarray(row["images"][0])), **texts}
        for k, name in enumerate(("chosen", *NAMES)):
            found |= {
                f"ref_{name}_logps": -3.0 - i - k,
                f"ref_{name}_avg_logps": -1.0,
                f"ref_{name}_per_token_logps": [-1.0],
            }
        rows.append(found)
    write_released(Dataset.from_list(rows), folder / "logp.parquet")
    return read_released(folder / "logp.parquet", cache_dir=folder)


def test_log_probs_of_the_released_parquet_are_used_without_a_pass(tmp_path, passes):
    data = released(tmp_path)
    trainer = trainer_of(data, tmp_path, kind="vision", reference_columns=True, extra={"eval_dataset": data})
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    held = batch["reference_logps"].logps
    assert held.dtype == torch.float32
    first = held.view(4, -1)
    assert torch.equal(first, first[0] - torch.arange(4.0)[:, None])
    with torch.no_grad():
        chosen = trainer.sequence_logps(trainer.model, batch).sum[:2]
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    rewards = 0.1 * (chosen - first[0]).mean()
    assert trainer._metrics["train"]["rewards/chosen"][0] == pytest.approx(rewards.item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.evaluate(data)["eval_loss"] > 0
    assert passes == []


def test_brought_log_probs_of_texts_and_what_does_not_go_together(tmp_path):
    data = pairs(range(4))
    with pytest.raises(
        ValueError, match=r"numbers in the column 'ref_chosen_logps' of train_dataset, .*: found only \["
    ):
        trainer_of(data, tmp_path, reference_columns=True)
    for name in ("chosen", *NAMES):
        data = data.add_column(f"ref_{name}_logps", [-4.0] * 4)
    trainer = trainer_of(data, tmp_path, reference_columns=True)
    assert (next(iter(trainer.get_train_dataloader()))["reference_logps"].logps == -4).all()
    trainer.train()
    with pytest.raises(ValueError, match=r"'ref_image_only_logps' of the dataset, .*: found only"):
        trainer.evaluate(data.remove_columns("ref_image_only_logps"))
    broken = data.remove_columns("ref_rejected_logps").add_column("ref_rejected_logps", [None] * 4)
    with pytest.raises(ValueError, match=r"'ref_rejected_logps' of eval_dataset, .*: found None"):
        trainer_of(data, tmp_path, reference_columns=True, extra={"eval_dataset": broken})
    with pytest.raises(ValueError, match=r"takes log-probs from the dataset, so that ref_model would not be used"):
        trainer_of(data, tmp_path, reference_columns=True, ref=tiny.llama())
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True computes them: set one"):
        arguments(NaPOConfig, tmp_path, reference_columns=True, precompute_ref_log_probs=True)
    for flag in ("reference_columns", "precompute_ref_log_probs"):
        with pytest.raises(ValueError, match=rf"{flag}=True is for a reference that stays as it is"):
            trainer_of(data, tmp_path, sync_ref_model=True, **{flag: True})
        with pytest.raises(ValueError, match=rf"{flag}=True needs the trainer's own data_collator .*, got function"):
            trainer_of(data, tmp_path, extra={"data_collator": lambda x: x}, **{flag: True})


def test_trl_collators_of_ones_own_carry_the_reference(tmp_path):
    mine = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=16)
    trainer = trainer_of(pairs(), tmp_path, precompute_ref_log_probs=True, extra={"data_collator": mine})
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (8, 16)
    assert isinstance(batch["reference_logps"], ReferenceLogps)
    vision = DataCollatorForVisionPreference(tiny.processor())
    trainer_of(
        tiny.vision_pairs(4), tmp_path, kind="vision", precompute_ref_log_probs=True, extra={"data_collator": vision}
    ).train()


def test_streams_have_no_pass(tmp_path):
    with pytest.raises(ValueError, match=r"the train dataset is a IterableDataset: it is not supported with streams"):
        trainer_of(pairs().to_iterable_dataset(), tmp_path, precompute_ref_log_probs=True)


def test_half_precision_of_deepspeed_does_not_reach_them(tmp_path, monkeypatch):
    """transformers casts every floating tensor of a batch to the dtype of DeepSpeed's engine."""
    trainer = trainer_of(pairs(), tmp_path, precompute_ref_log_probs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    held = batch["reference_logps"].logps.clone()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer.accelerator.state, "deepspeed_plugins", {"one": plugin}, raising=False)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    passed = trainer._prepare_inputs({**batch, "pixels": torch.zeros(1)})
    assert passed["pixels"].dtype == torch.bfloat16
    assert torch.equal(trainer.reference_of(passed), held)


def test_a_collator_of_ones_own_may_bring_a_tensor(tmp_path):
    trainer = trainer_for("text", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["reference_logps"] = torch.arange(8.0).view(4, 2)
    assert torch.equal(trainer.reference_of(batch), torch.arange(8.0))
    assert json.dumps(trainer.recipe.named["rejected"].q) == "0.0"
