"""NaPOTrainer against a by-hand computation on full logits, and against TRL's own DPOTrainer."""

import copy
import dataclasses
import pickle
import runpy
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import BatchFeature, MixtralConfig, MixtralForCausalLM, Qwen2VLImageProcessorPil
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

import napo_loss
import tiny
from napo_loss import Negative, Recipe, reference
from napo_loss.objective.recipes import METHODS
from napo_loss.trl import STATE_FILE, NaPOConfig, NaPOTrainer
from napo_loss.trl.config import REFUSED
from napo_loss.trl.data import NegativesCollator, OncePerPrompt
from napo_loss.trl.floors import PATIENCE, Floors

pytestmark = [
    # transformers 5.23 warns about names that TRL 1.16 still uses; pin_memory has nothing to pin to here.
    pytest.mark.filterwarnings("ignore:.*(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]
NAMES = ["rejected", "question_only", "image_only"]


def arguments(cls, folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "save_strategy": "no", "max_steps": 2, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(str(folder), **{**defaults, **kwargs})


def moved(model):
    """A policy that is not its reference: margins differ from 0."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return other


def trainer_for(kind, folder, *, columns=NAMES, trainer=NaPOTrainer, config=NaPOConfig, n=4, **kwargs):
    vision = kind == "vision"
    model, processing = (tiny.llava(), tiny.processor()) if vision else (tiny.llama(), tiny.tokenizer())
    data = tiny.vision_pairs(n) if vision else tiny.text_pairs(n)
    data = data.remove_columns([c for c in NAMES if c not in ["rejected", *columns]])
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "peft_config") if key in kwargs}
    ref = None if "peft_config" in extra or kwargs.get("precompute_ref_log_probs") else model
    policy = moved(model) if ref is not None else model
    return trainer(
        policy, ref, arguments(config, folder, **kwargs), train_dataset=data, processing_class=processing, **extra
    )


def logps_by_hand(model, batch):
    """Sequence log-probs from full logits: no fused head, no trainer."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(**{k: v for k, v in batch.items() if k not in ("completion_mask", "reference_logps")}).logits
    return reference.sequence_logps(logits.double(), labels)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize("columns", [["rejected"], ["rejected", "image_only"], NAMES])
def test_precomputed_reference_is_the_reference(columns, tmp_path):
    data = tiny.text_pairs(4)
    now = trainer_for("text", tmp_path / "a", columns=columns)
    before = trainer_for("text", tmp_path / "b", columns=columns, precompute_ref_log_probs=True, eval_dataset=data)
    batches = [next(iter(t.get_train_dataloader())) for t in (now, before)]
    expected = logps_by_hand(now.ref_model, batches[0]).sum.view(1 + len(columns), -1)
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(batches[1]["reference_logps"].double(), expected, rtol=1e-5, atol=1e-5)
    assert before.ref_model is None
    before.train()
    assert before.evaluate()["eval_loss"] > 0


def test_peft_reference_is_the_base_model(tmp_path):
    trainer = trainer_for("text", tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    with torch.no_grad(), trainer.model.disable_adapter():
        expected = logps_by_hand(trainer.model, batch).sum
    actual = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


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


def test_a_negative_of_any_name_with_its_own_settings(tmp_path):
    model, data = tiny.llama(), tiny.text_pairs(4).rename_column("image_only", "paraphrase")
    config = arguments(
        NaPOConfig, tmp_path, negatives={"rejected": {"q": 0.3}, "paraphrase": {"alpha": 0.2, "margin": "mean"}}
    )
    trainer = NaPOTrainer(moved(model), model, config, train_dataset=data, processing_class=tiny.tokenizer())
    assert trainer.recipe.negatives["paraphrase"] == Negative(alpha=0.2, margin="mean")
    trainer.train()
    assert float(trainer.state.log_history[0]["napo/q/rejected"]) == pytest.approx(0.3)
    assert "napo/weight/paraphrase" in trainer.state.log_history[0]
    text = trainer.processing_class.decode(trainer.train_dataset[0]["paraphrase_ids"])
    assert text == "mat </s>"


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


# Data: further negatives are prepared as TRL prepares `rejected`.


def text_trainer(data, folder, trainer=NaPOTrainer, config=NaPOConfig, model=None, ref=None, extra=None, **kwargs):
    return trainer(
        model or moved(tiny.llama()), ref or tiny.llama(), arguments(config, folder, **kwargs), train_dataset=data,
        processing_class=tiny.tokenizer(), **(extra or {}),
    )  # fmt: skip


def conversation(example):
    roles = {"prompt": "user"}
    return {k: [{"role": roles.get(k, "assistant"), "content": v.strip()}] for k, v in example.items()}


@pytest.mark.parametrize("style", ["plain", "conversational"])
@pytest.mark.parametrize("beginning", ["", "s"])  # "s" merges with the last word of the prompt: the prompt gets shorter
def test_a_further_negative_is_tokenised_like_rejected(style, beginning, tmp_path):
    data = tiny.text_pairs(3).remove_columns(["question_only", "image_only"])
    theirs = data.map(lambda x: {"rejected": beginning + x["rejected"]})
    ours = theirs.rename_column("rejected", "other").add_column("rejected", data["chosen"])
    if style == "conversational":
        ours, theirs = ours.map(conversation), theirs.map(conversation)
    expected = text_trainer(theirs, tmp_path, DPOTrainer, DPOConfig, max_length=7).train_dataset
    trainer = text_trainer(ours, tmp_path, negatives={"other": {}}, max_length=7)
    for a, b in zip(trainer.train_dataset, expected, strict=True):
        assert [a["prompt_ids"], a["chosen_ids"], a["other_ids"]] == [
            b["prompt_ids"],
            b["chosen_ids"],
            b["rejected_ids"],
        ]
    if style == "plain" and beginning:
        assert len(trainer.train_dataset[0]["prompt_ids"]) == 1
    again = trainer._prepare_dataset(trainer.train_dataset, trainer.processing_class, trainer.args, "again")
    assert again[:] == trainer.train_dataset[:]
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert ids.shape[1] <= 7


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


def test_streams(tmp_path):
    whole, stream = tiny.text_pairs(4), tiny.text_pairs(4).to_iterable_dataset()
    trainers = [text_trainer(x, tmp_path, extra={"eval_dataset": x}) for x in (whole, stream)]
    a, b = (t.evaluate()["eval_loss"] for t in trainers)
    assert a == pytest.approx(b)
    trainers[1].train()


def test_reference_log_probs_are_cached_per_pair_of_columns(tmp_path, monkeypatch):
    tiny.text_pairs(4).save_to_disk(str(tmp_path / "pairs"))
    saved, passes = Dataset.load_from_disk(str(tmp_path / "pairs")), []
    once = NaPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(NaPOTrainer, "compute_ref_log_probs", lambda *a: passes.append(1) or once(*a))
    found = []
    for columns in (NAMES, NAMES, ["rejected", "image_only"]):
        data = saved.select_columns(["prompt", "chosen", *columns])
        trainer = text_trainer(data, tmp_path, precompute_ref_log_probs=True)
        found.append((len(passes), trainer.train_dataset["ref_image_only_logps"][:]))
        passes.clear()
    # Two batches for each pair of columns, the last pair being (image_only, chosen); the second time nothing is left.
    assert [n for n, _ in found] == [4, 0, 4]
    assert found[0][1] == found[1][1] == pytest.approx(found[2][1])
    held_out = trainer.evaluate(tiny.text_pairs(2))
    assert held_out["eval_napo/q/image_only"] > 0


class Patches:
    """In the form of Qwen's processors: patches of all images in one row of tensors, a grid per image, type ids."""

    def __init__(self):
        self.tokenizer, self.images = tiny.tokenizer(), 0
        self.patches = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)

    def apply_chat_template(self, messages, **kwargs):
        return self.tokenizer.apply_chat_template(messages, **{**kwargs, "tokenize": False})

    def __call__(self, text, images=None, **kwargs):
        out = self.tokenizer(text, **kwargs)
        ids = out["input_ids"]
        types = {"token_type_ids": torch.zeros_like(ids), "mm_token_type_ids": (ids == 3).long()}
        if images is None:
            return BatchFeature({**out, **types})
        flat = [image for row in images for image in row]
        self.images += len(flat)
        return BatchFeature({**out, **types, **self.patches(flat, return_tensors="pt")})


def test_patches_grids_and_type_ids_follow_their_block():
    draw = np.random.default_rng(0)
    examples = [dict(x) for x in tiny.vision_pairs(3)]
    for i, example in enumerate(examples):  # 0, 1 and 2 images of several sizes
        shapes = [(16, 8 * (i + 1), 3)] * i
        example["images"] = [Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]
    for K in (1, 2, 3):
        processor = Patches()
        batch = NegativesCollator(DataCollatorForVisionPreference(processor), NAMES[:K], "")(copy.deepcopy(examples))
        assert processor.images == 3  # each image once, not once per block
        for k, name in enumerate(NAMES[:K], start=1):
            two = [{**x, "rejected": x[name]} for x in copy.deepcopy(examples)]
            expected = DataCollatorForVisionPreference(Patches())(two)
            assert set(batch) == set(expected)
            for x in (batch, expected):  # what fills up the end is masked: TRL takes one token or the other
                x["input_ids"] = x["input_ids"] * x["attention_mask"]
            for key, x in expected.items():
                blocks, halves = batch[key].chunk(1 + K), x.chunk(2)
                for mine, theirs in ((blocks[0], halves[0]), (blocks[k], halves[1])):
                    T = theirs.shape[-1] if "ids" in key or "mask" in key else None
                    assert torch.equal(mine[..., :T], theirs), (K, name, key)
                    assert T is None or not mine[..., T:].any()


def test_prompts_that_differ_between_blocks_are_processed_one_by_one():
    processor = Patches()
    once = OncePerPrompt(processor, copies=2)
    image = [Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))]
    kwargs = {"images": [image, image], "padding": True, "return_tensors": "pt"}
    same, different = once(text=["the cat"] * 2, **kwargs), once(text=["the cat", "the dog"], **kwargs)
    assert processor.images == 1 + 2
    assert same["image_grid_thw"].shape == different["image_grid_thw"].shape == (2, 3)
    assert different["input_ids"][0, 1] != different["input_ids"][1, 1]
    assert pickle.loads(pickle.dumps(OncePerPrompt(tiny.tokenizer(), 2))).pad_token_id == 0  # for data loader workers


def test_trl_collators_of_ones_own_are_extended(tmp_path):
    mine = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=16)
    trainer = text_trainer(tiny.text_pairs(4), tmp_path, extra={"data_collator": mine})
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (8, 16)


def test_a_max_length_that_cuts_off_images_is_explained(tmp_path):
    trainer = trainer_for("vision", tmp_path, max_length=3)
    with pytest.raises(ValueError, match=r"`max_length` \(3\) is too short"):
        trainer.train()


# Models.


def test_a_pretrained_adapter_is_its_own_reference(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = NaPOTrainer(
        model, args=arguments(NaPOConfig, tmp_path, learning_rate=1.0), train_dataset=tiny.text_pairs(4),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = logps_by_hand(trainer.model, batch).sum
    trainer.train()
    assert float(trainer.state.log_history[0]["rewards/chosen"]) == pytest.approx(0, abs=1e-6)
    assert abs(float(trainer.state.log_history[1]["rewards/chosen"])) > 1e-4
    actual = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


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


def test_a_model_without_a_name_is_its_own_reference(tmp_path):
    model = tiny.llama()
    trainer = NaPOTrainer(
        model, args=arguments(NaPOConfig, tmp_path), train_dataset=tiny.text_pairs(4), processing_class=tiny.tokenizer()
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(model.lm_head.weight, trainer.ref_model.lm_head.weight)


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


# Refusals: nothing is silently ignored.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "ipo"), ("loss_type", ["sigmoid", "sft"]), ("loss_weights", [0.5]), ("ld_alpha", 0.5),
        ("f_divergence_type", "js_divergence"), ("f_alpha_divergence_coef", 0.3), ("label_smoothing", 0.1),
        ("use_weighting", True), ("discopop_tau", 0.1), ("padding_free", True),
    ],
)  # fmt: skip
def test_options_of_other_losses_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect on the NaPO loss and is refused"):
        arguments(NaPOConfig, tmp_path, **{name: value})


def test_every_option_of_dpoconfig_is_classified():
    """A TRL release that adds an option fails here, until somebody decides whether it still means something."""
    inherited = {f.name for f in dataclasses.fields(DPOConfig.__mro__[1])}
    own = {f.name for f in dataclasses.fields(DPOConfig)} - inherited
    honoured = {  # by TRL's code, which prepares models and data as ever
        "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc",
        "max_length", "truncation_mode", "pad_to_multiple_of", "precompute_ref_log_probs",
        "precompute_ref_batch_size", "beta", "activation_offloading", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "pad_token",
    }  # fmt: skip
    assert own == honoured | set(REFUSED)


def test_a_weight_that_stays_at_its_floor_is_said_once(tmp_path, caplog):
    trainer = trainer_for("text", tmp_path, max_steps=1)
    seen = []
    trainer.floors = seen.append
    trainer.train()
    assert [list(weights) for weights in seen] == [NAMES]
    assert all(weight >= 0.00999 for weight in seen[0].values())
    floors = Floors()
    for step in range(2 * PATIENCE + 5):
        floors({"rejected": 0.01 if step % 3 else 0.5, "question_only": 0.98, "image_only": 0.01})
    (said,) = [r.getMessage() for r in caplog.records if r.name == "napo_loss.trl.floors"]
    assert "the dynamic weight of 'image_only' has been at its floor of 0.01 for 200 micro-batches" in said


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_is_not_set(method, tmp_path):
    trainer = trainer_for("text", tmp_path, method=method, q_decay=0.5)
    assert trainer.recipe == dataclasses.replace(METHODS[method], decay=0.5)
    trainer.train()
    logged = trainer.state.log_history[0]
    plain = NaPOTrainer(
        tiny.llama(), tiny.llama(), arguments(NaPOConfig, tmp_path, method=method), train_dataset=tiny.text_pairs(4),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    plain.train()  # policy and reference are equal at its first step
    first = plain.state.log_history[0]
    if method != "scale_free":  # which reads rounding noise as anything else: its q is 1 where margins are 0 to the bit
        starts = {"released": [0.0, 1.0, 1.0], "paper": [0.0, 0.5, 0.5]}[method]
        assert [float(first[f"napo/q/{name}"]) for name in NAMES] == pytest.approx(starts, abs=1e-3)
    assert [float(first[f"napo/weight/{name}"]) for name in NAMES] == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert sum(float(logged[f"napo/weight/{name}"]) for name in NAMES) == pytest.approx(1, abs=0.02)
    two = arguments(NaPOConfig, tmp_path, method=method).recipe(["rejected", "image_only"])
    assert two.weights == "fixed"
    assert [n.weight for n in two.named.values()] == [0.5, 0.5]
    assert two.named["image_only"].estimator == METHODS[method].named["image_only"].estimator
    fixed = arguments(NaPOConfig, tmp_path, method=method, negative_weights="fixed").recipe(NAMES)
    assert fixed == dataclasses.replace(METHODS[method], weights="fixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "published"}, r"method must be one of \['released', 'paper', 'scale_free'\], got 'published'"),
        ({"negatives": {"rejected": {"gamma": 1}}}, r"negatives\['rejected'\] = .*unexpected keyword argument 'gamma'"),
        ({"negatives": {"rejected": {"q": 2.0}}}, r"Negative.q must be None or in \[0, 1\]"),
        ({"negatives": {}}, "negatives must map column names to settings"),
        ({"negative_weights": "learned"}, r"Recipe.weights must be 'fixed' or 'dynamic'"),
        ({"sft_weight": -1.0}, r"Recipe.sft_weight must be >= 0"),
        ({"q_from": "max"}, r"Recipe.q_from must be"),
        ({"q_decay": 1.0}, r"Recipe.decay must be in \[0, 1\)"),
    ],
)
def test_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(NaPOConfig, tmp_path, **options)


def test_settings_that_contradict_each_other_or_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"decay = 0\.9 has nothing to smooth with q_from='each_pair'"):
        trainer_for("text", tmp_path, q_decay=0.9, q_from="each_pair")
    trainer_for("text", tmp_path, q_decay=0.9, save_strategy="steps", save_steps=2).train()
    other = trainer_for("text", tmp_path, columns=["rejected"], q_decay=0.9, max_steps=3)
    with pytest.raises(
        ValueError, match=r"holds moments for \['rejected', 'question_only', 'image_only'\], but the negatives"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["chosen", "prompt", "margins", "accuracies"])
def test_names_with_another_meaning_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"no negative can be called '{name}'"):
        text_trainer(tiny.text_pairs(4), tmp_path, negatives={"rejected": {}, name: {}})


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ImportError, match=r'pip install "napo-loss\[trl\]"'):
        runpy.run_path(napo_loss.trl.__file__)


@pytest.mark.parametrize("found", ["0.24.0", "1.15.2", "1.9"])
def test_beside_an_older_trl_both_versions_are_named(found, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: found)
    with pytest.raises(ImportError, match=rf"needs TRL 1\.16 or newer, found {found}: pip install --upgrade"):
        runpy.run_path(napo_loss.trl.__file__)


@pytest.mark.parametrize("found", ["1.16.0", "1.16.0rc1", "1.20.1.dev0"])
def test_beside_a_newer_trl_it_imports(found, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: found)
    assert "NaPOTrainer" in runpy.run_path(napo_loss.trl.__file__)


def test_datasets_without_rows_or_with_their_splits_are_named(tmp_path):
    data = tiny.text_pairs(4)
    nothing = data.select([])
    stream = data.to_iterable_dataset().filter(lambda _: False)
    for empty in (nothing, stream, Dataset.from_dict({"prompt": [], "chosen": []})):
        with pytest.raises(ValueError, match="train_dataset is empty: it holds no row"):
            text_trainer(empty, tmp_path)
    with pytest.raises(ValueError, match=r"eval_dataset is empty"):
        text_trainer(data, tmp_path, extra={"eval_dataset": nothing})
    with pytest.raises(ValueError, match=r"eval_dataset\['held out'\] is empty"):
        text_trainer(data, tmp_path, extra={"eval_dataset": {"seen": data, "held out": nothing}})
    with pytest.raises(TypeError, match=r"train_dataset must be one dataset, got a DatasetDict of \['train', 'test'\]"):
        text_trainer(DatasetDict(train=data, test=data), tmp_path)
    several = DatasetDict(seen=data, unseen=data)  # which is what evaluation on named splits takes
    text_trainer(data, tmp_path, extra={"eval_dataset": several})


def test_missing_columns_are_named(tmp_path):
    for kind, data in (("text", tiny.text_pairs(4)), ("vision", tiny.vision_pairs(4))):
        with pytest.raises(ValueError, match="the dataset lacks the column 'image_only'"):
            trainer_for(kind, tmp_path, eval_dataset={"held out": data.remove_columns("image_only")})
    with pytest.raises(ValueError, match="the dataset lacks the column 'image_only'"):
        trainer_for("text", tmp_path, columns=["rejected"], negatives={"rejected": {}, "image_only": {}})
    data = tiny.text_pairs(4).remove_columns("prompt")
    with pytest.raises(ValueError, match="several negatives need an explicit 'prompt' column"):
        NaPOTrainer(
            tiny.llama(), tiny.llama(), arguments(NaPOConfig, tmp_path), train_dataset=data,
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
    with pytest.raises(TypeError, match="args must be a NaPOConfig, got DPOConfig"):
        NaPOTrainer(tiny.llama(), args=arguments(DPOConfig, tmp_path), train_dataset=data)
