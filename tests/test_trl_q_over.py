"""q over the batch of an optimiser step: the same numbers however it is split into micro-batches."""

import copy

import pytest
import torch
from peft import LoraConfig

import tiny
from draws import quick
from napo_loss import napo_loss
from napo_loss.trl import NaPOConfig, NaPOTrainer
from napo_loss.trl.batch import KEY
from trainers import NAMES, QUIET, Gradients, Recorded, arguments, logps_by_hand, moved, pairs

pytestmark = QUIET
QUICK = "released", "images", "LoRA"
OPTIONS = {
    "released": {},
    "fixed weights": {"negative_weights": "fixed", "method": "scale_free"},
    "average_logps, sft_weight": {"negative_weights": "dynamic", "average_logps": True, "sft_weight": 0.2},
    "smoothed": {"q_decay": 0.5},
    "each pair": {"q_from": "each_pair"},
    "one negative": {"negatives": {"rejected": {"alpha": 0.2}}},
    "kept reference": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "images": {"kind": "vision"},
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}


def run(folder, B, steps, *, rows=8, cls=Recorded, **options):
    """Trains by plain SGD on the rows in their order, once; every numbers of it."""
    vision = options.pop("kind", None) == "vision"
    extra = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    model = tiny.llava() if vision else tiny.llama()
    in_order = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    plain = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "q_over": "batch"}
    shape = {"per_device_train_batch_size": B, "gradient_accumulation_steps": steps}
    args = arguments(NaPOConfig, folder, **{**in_order, **plain, **shape, **options})
    torch.manual_seed(0)
    trainer = cls(
        copy.deepcopy(model) if extra else moved(model), None if extra else model, args, callbacks=[Gradients()],
        train_dataset=tiny.vision_pairs(rows) if vision else pairs(range(rows)),
        processing_class=tiny.processor() if vision else tiny.tokenizer(), **extra,
    )  # fmt: skip
    trainer.train()
    trainer.gradients = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).steps
    return trainer


def assert_same(one, split, micro_batches, tolerance=1e-5):
    """Gradients, weights, q and weights of negatives of every step; losses add up over its micro-batches."""
    assert len(one.gradients) == len(split.gradients) > 0
    for a, b in zip(one.gradients, split.gradients, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                b[name], a[name], rtol=tolerance, atol=tolerance / 10, msg=lambda m, n=name: f"{n}: {m}"
            )
    parts = iter(split.steps)
    for whole in one.steps:
        found = [next(parts) for _ in range(micro_batches)]
        assert sum(x["loss"] for x in found) / len(found) == pytest.approx(whole["loss"], rel=tolerance)
        for name in (f"napo/{kind}/{n}" for kind in ("q", "weight") for n in one.negatives):
            if one.recipe.q_from == "each_pair" and name.startswith("napo/q"):
                mean = sum(x[name] for x in found) / len(found)
                assert mean == pytest.approx(whole[name], rel=tolerance)
            else:
                assert all(x[name] == pytest.approx(whole[name], rel=tolerance) for x in found), name
    assert next(parts, None) is None
    for (name, p), q in zip(one.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance / 10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", quick(QUICK, OPTIONS))
def test_a_batch_of_four_in_one_two_and_four_pieces(name, tmp_path):
    one, two, four = (run(tmp_path, B, 4 // B, **copy.deepcopy(OPTIONS[name])) for B in (4, 2, 1))
    assert len(one.gradients) == 2
    assert_same(one, two, 2, 2e-2 if name == "bf16" else 1e-5)
    assert_same(one, four, 4, 2e-2 if name == "bf16" else 1e-5)
    if name == "smoothed":
        for other in (two, four):
            torch.testing.assert_close(other.napo.previous_moments, one.napo.previous_moments)


@pytest.mark.parametrize(("B", "micro_batches"), [(4, 2), (3, 3), (2, 4), (6, 2)])
@pytest.mark.parametrize("name", quick(["average_logps, sft_weight"], ["released", "average_logps, sft_weight"]))
def test_a_ragged_last_micro_batch(name, B, micro_batches, tmp_path):
    one, split = (run(tmp_path, *shape, rows=7, **OPTIONS[name]) for shape in ((7, 1), (B, micro_batches)))
    assert len(one.gradients) == 1
    assert [x["loss"] for x in one.steps] == [one.steps[0]["loss"]]
    for name in one.gradients[0]:
        torch.testing.assert_close(split.gradients[0][name], one.gradients[0][name], rtol=1e-5, atol=1e-6)
    for kind in ("q", "weight"):
        for n in NAMES:
            found = {x[f"napo/{kind}/{n}"] for x in split.steps}
            assert len(found) == 1
            assert found.pop() == pytest.approx(one.steps[0][f"napo/{kind}/{n}"], rel=1e-5)


def test_the_gradient_is_that_of_all_pairs_by_hand(tmp_path):
    """On full logits in float64, all pairs of a step in one call."""
    trainer = run(tmp_path, 2, 4, rows=7, method="scale_free")
    ours = trainer.gradients[0]
    model, ref = moved(tiny.llama()).double(), tiny.llama().double()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(7)])
    policy = logps_by_hand(model, batch).pairs(3)
    with torch.no_grad():
        reference = logps_by_hand(ref, batch).pairs(3)
    out = napo_loss(*policy, *reference, recipe=trainer.recipe)
    out.losses.mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name].double(), p.grad, rtol=1e-3, atol=1e-6, msg=name)
    for k, name in enumerate(NAMES):
        assert trainer.steps[0][f"napo/q/{name}"] == pytest.approx(out.q[k].item(), rel=1e-4)
        assert trainer.steps[0][f"napo/weight/{name}"] == pytest.approx(out.weights[k].item(), rel=1e-4)
    by_micro_batch = run(tmp_path, 2, 4, rows=7, method="scale_free", q_over="micro_batch")
    assert len({x["napo/q/image_only"] for x in by_micro_batch.steps}) == 4


class Counted(Recorded):
    """How often the policy and the reference run."""

    policy, reference = 0, 0

    def sequence_logps(self, *args, **kwargs):
        self.policy += 1
        return super().sequence_logps(*args, **kwargs)

    def reference_logps(self, *args, **kwargs):
        self.reference += 1
        return super().reference_logps(*args, **kwargs)


@pytest.mark.slow
def test_what_it_costs(tmp_path):
    """One more pass of the policy, where a batch is accumulated; the reference's pass serves both."""
    for (B, steps), over, passes in (((4, 1), "batch", 1), ((1, 4), "batch", 2), ((1, 4), "micro_batch", 1)):
        trainer = run(tmp_path, B, steps, rows=4, cls=Counted, q_over=over)
        assert trainer.reference == steps
        assert trainer.policy - trainer.reference == passes * steps


@pytest.mark.parametrize("dropout", quick([0.5], [0.0, 0.5]))
def test_random_numbers_are_left_alone(dropout, tmp_path, monkeypatch):
    """With a fixed q the pass changes nothing, dropout included: the step draws what it would have drawn."""
    once = tiny.llama

    def llama():
        model = once()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        return model

    monkeypatch.setattr(tiny, "llama", llama)
    fixed = {"negatives": {name: {"q": 0.5} for name in NAMES}, "disable_dropout": False}
    a, b = (run(tmp_path, 2, 2, q_over=over, **fixed) for over in ("micro_batch", "batch"))
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    if dropout:
        c = run(tmp_path, 2, 2, q_over="batch", seed=7, **fixed)
        assert not torch.allclose(a.model.lm_head.weight, c.model.lm_head.weight, rtol=1e-4)


def test_after_an_evaluation_the_pass_is_in_training_mode(tmp_path):
    modes = []

    class Watched(Recorded):
        def sequence_logps(self, model, inputs, **kwargs):
            if not torch.is_grad_enabled() and model is self.model_wrapped and self.is_in_train:
                modes.append(model.training)
            return super().sequence_logps(model, inputs, **kwargs)

        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            modes.append("evaluated")
            return found

    model = tiny.llama()
    args = arguments(
        NaPOConfig,
        tmp_path,
        q_over="batch",
        gradient_accumulation_steps=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = Watched(
        moved(model),
        model,
        args,
        train_dataset=pairs(),
        eval_dataset=pairs(range(2)),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    after = modes[modes.index("evaluated") + 1 :]
    assert after[:2] == [True, True]


def test_a_checkpoint_keeps_the_step_of_smoothing(tmp_path):
    options = {"q_decay": 0.9, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = run(tmp_path / "whole", 2, 2, **options)
    args = whole.args
    model = tiny.llama()
    resumed = Recorded(moved(model), model, args, train_dataset=pairs(range(8)), processing_class=tiny.tokenizer())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    torch.testing.assert_close(resumed.napo.previous_moments, whole.napo.previous_moments)
    for a, b in zip(resumed.steps, whole.steps[4:], strict=True):
        assert a["napo/q/image_only"] == pytest.approx(b["napo/q/image_only"])


def test_the_batch_rides_with_its_micro_batches(tmp_path):
    trainer = run(tmp_path, 2, 2)
    samples = list(trainer.get_train_dataloader())[:2]
    marked, count = trainer.get_batch_samples(iter(samples), 2, trainer.args.device)
    assert count is None
    assert [x[KEY].moments is marked[0][KEY].moments for x in marked] == [True, True]
    passed = trainer._prepare_inputs(marked[0])
    assert passed[KEY] is marked[0][KEY]
    assert KEY not in samples[0]
    plain = NaPOTrainer(
        tiny.llama(),
        tiny.llama(),
        arguments(NaPOConfig, tmp_path),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
    )
    assert plain.get_batch_samples(iter(samples), 2, plain.args.device)[0] == samples
