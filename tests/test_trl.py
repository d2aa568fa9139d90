"""NaPOTrainer against a by-hand computation on full logits, and against TRL's own DPOTrainer."""

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

import napo_loss
import tiny
from napo_loss import Recipe
from napo_loss.trl import STATE_FILE, NaPOConfig, NaPOTrainer
from napo_loss.trl.floors import PATIENCE, Floors
from napo_loss.trl.models import initial
from trainers import COMPARES, NAMES, QUIET, gradients, logps_by_hand, moved, text_trainer, trainer_for

pytestmark = QUIET


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("columns", [["rejected"], ["rejected", "image_only"], NAMES])
@pytest.mark.parametrize("options", [{}, {"average_logps": True, "sft_weight": 0.2, "negative_weights": "dynamic"}])
def test_loss_and_gradient_are_those_computed_by_hand(kind, columns, options, tmp_path):
    trainer = trainer_for(kind, tmp_path, columns=columns, **options)
    K = len(columns)
    assert trainer.negatives == columns
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 2 * (1 + K)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = gradients(trainer.model)

    trainer.model.zero_grad()
    policy = logps_by_hand(trainer.model, batch).pairs(K)
    with torch.no_grad():
        ref = logps_by_hand(trainer.ref_model, batch).pairs(K)
    # One negative, unnamed and named, is Negative(); several have those of RELEASED by name.
    recipe = Recipe(
        weights=options.get("negative_weights"), average_logps=options.get("average_logps", False),
        sft_weight=options.get("sft_weight", 0.0),
    )  # fmt: skip
    if K == 1:
        expected = napo_loss.napo_loss(*policy, ref[0].sum, ref[1].sum, recipe=recipe)
    else:
        named = [{n: type(x)(x.sum[k], x.length[k]) for k, n in enumerate(columns)} for x in (policy[1], ref[1])]
        expected = napo_loss.napo_loss(policy[0], named[0], ref[0], named[1], recipe=recipe)
    torch.testing.assert_close(loss.double(), expected.losses.mean(), rtol=1e-5, atol=1e-6)
    expected.losses.mean().backward()
    for name, grad in gradients(trainer.model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=2e-6, msg=name)


@COMPARES
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_q_zero_is_trl_dpo_to_the_bit_of_its_batch(kind, tmp_path):
    ours = trainer_for(kind, tmp_path, columns=["rejected"], negatives={"rejected": {"q": 0.0}})
    theirs = trainer_for(kind, tmp_path, columns=["rejected"], trainer=DPOTrainer, config=DPOConfig)
    a, b = (next(iter(t.get_train_dataloader())) for t in (ours, theirs))
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = []
    for trainer in (ours, theirs):
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, a))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    other = gradients(theirs.model)
    for name, grad in gradients(ours.model).items():
        torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-7, msg=name)
    mine, trls = ours._metrics["train"], theirs._metrics["train"]
    for name in trls:  # every metric TRL logs, with its value
        assert mine[name] == pytest.approx(trls[name], rel=1e-4, abs=1e-6), name


def test_metrics_per_negative(tmp_path):
    trainer = trainer_for("text", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    with torch.no_grad():
        policy, ref = (logps_by_hand(m, batch).sum.view(4, -1) for m in (trainer.model, trainer.ref_model))
    rewards = 0.1 * (policy - ref)
    for k, name in enumerate(NAMES, start=1):
        assert logged[f"rewards/{name}"] == pytest.approx(rewards[k].mean().item(), abs=1e-5)
        assert logged[f"rewards/margins/{name}"] == pytest.approx((rewards[0] - rewards[k]).mean().item(), abs=1e-5)
        share = (rewards[0] > rewards[k]).double().mean().item()
        assert logged[f"rewards/accuracies/{name}"] == pytest.approx(share)
        assert logged[f"logps/{name}"] == pytest.approx(policy[k].mean().item(), rel=1e-5)
    gains = ((rewards[0] - rewards[1:]) / 0.1).mean(1).clamp_min(0) + 0.05
    weights = (gains / gains.sum()).clamp_min(0.01).tolist()
    assert [logged[f"napo/weight/{name}"] for name in NAMES] == pytest.approx(weights, rel=1e-4)
    assert logged["napo/q/rejected"] == 0
    margin = 10 * (rewards[0] - rewards[3]).mean()
    assert logged["napo/q/image_only"] == pytest.approx((2 * torch.sigmoid(-0.01 * margin)).clamp(max=1).item())
    assert logged["rewards/margins"] == pytest.approx((rewards[0] - rewards[1:]).mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_trains_accumulates_and_evaluates(kind, tmp_path):
    data = tiny.vision_pairs(4) if kind == "vision" else tiny.text_pairs(4)
    trainer = trainer_for(kind, tmp_path, gradient_accumulation_steps=2, eval_dataset=data, max_steps=3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    final = trainer.state.log_history[-1]
    for name in ("rewards/margins", "rewards/accuracies", *(f"napo/q/{n}" for n in NAMES)):
        assert f"eval_{name}" in final
    assert float(final["eval_rewards/margins"]) > 0
    loss, logits, labels = trainer.prediction_step(
        trainer.model, next(iter(trainer.get_eval_dataloader())), prediction_loss_only=False
    )
    assert logits.shape[:2] == labels.shape
    assert torch.isfinite(loss)


def test_smoothed_moments_survive_a_checkpoint(tmp_path):
    options = {"q_decay": 0.9, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for("text", tmp_path / "whole", **options)
    whole.train()
    assert (tmp_path / "whole/checkpoint-2" / STATE_FILE).exists()
    resumed = trainer_for("text", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    moments = whole.napo.previous_moments
    torch.testing.assert_close(resumed.napo.previous_moments, moments)
    held = moments.clone()
    whole.evaluate(whole.train_dataset)  # reads none, leaves none behind
    assert torch.equal(whole.napo.previous_moments, held)


@COMPARES
@pytest.mark.skipif(not hasattr(DPOConfig, "router_aux_loss_coef"), reason="this TRL adds none")
def test_mixture_of_experts_adds_the_loss_of_its_router_as_trl_does(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tiny.WORDS.split()), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **size, **tokens))
    data = tiny.text_pairs(4).remove_columns(["question_only", "image_only"])
    losses, kwargs = [], {"router_aux_loss_coef": 0.5}
    for cls, config, more in (
        (NaPOTrainer, NaPOConfig, {"negatives": {"rejected": {"q": 0.0}}}),
        (DPOTrainer, DPOConfig, {}),
    ):
        trainer = text_trainer(data, tmp_path, cls, config, moved(model), copy.deepcopy(model), **kwargs, **more)
        losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
    torch.testing.assert_close(*losses)
    assert losses[0] > 1  # 0.5 times about 2 for the router


def test_accumulated_micro_batches_are_one_batch_when_q_is_fixed(tmp_path):
    options = {"negatives": {name: {"q": 0.5} for name in NAMES}, "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
    weights = []
    for B, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = text_trainer(
            tiny.text_pairs(4), tmp_path, per_device_train_batch_size=B, gradient_accumulation_steps=steps, **options
        )
        trainer.train()
        weights.append(trainer.model.lm_head.weight)
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2])


def test_bf16_with_gradient_checkpointing(tmp_path):
    losses = []
    for kwargs in ({}, {"bf16": True, "gradient_checkpointing": True}):
        trainer = text_trainer(tiny.text_pairs(4), tmp_path, **kwargs)
        trainer.train()
        losses.append(float(trainer.state.log_history[0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_model_card_cites_the_method(tmp_path):
    text_trainer(tiny.text_pairs(4), tmp_path).create_model_card(model_name="debiased")
    card = (tmp_path / "README.md").read_text()
    assert "trained with NaPO, a method introduced in [Debiasing Multimodal Large Language Models" in card
    assert "rafailov" not in card


def test_no_copy_is_made_of_a_model_that_is_partitioned(tmp_path):
    """By ZeRO-3 as it was loaded: a rank has but a part of each weight."""
    model, args = tiny.llama(), NaPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    assert initial(model, args, None, kept=False) is not None
    next(model.parameters()).ds_id = 0
    assert initial(model, args, None, kept=False) is None


def test_a_weight_that_stays_at_its_floor_is_said_once(tmp_path, caplog):
    trainer = trainer_for("text", tmp_path, max_steps=1)
    seen = []
    trainer.floors = seen.append
    trainer.train()
    assert [list(weights) for weights in seen] == [NAMES]
    assert all(weight >= 0.00999 for weight in seen[0].values())
    floors = Floors()
    for step in range(2 * PATIENCE + 5):
        if step == PATIENCE - 1:
            assert not caplog.records
        floors({"rejected": 0.01 if step % 3 else 0.5, "question_only": 0.98, "image_only": 0.01})
    (said,) = [r.getMessage() for r in caplog.records if r.name == "napo_loss.trl.floors"]
    assert "the dynamic weight of 'image_only' has been at its floor of 0.01 for 200 micro-batches" in said
