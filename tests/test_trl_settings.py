"""What NaPOTrainer's arguments say about the loss: nothing is silently ignored, and nothing contradicts."""

import dataclasses

import pytest
from transformers import TrainingArguments
from trl import DPOConfig

import tiny
from draws import quick
from napo_loss import Negative, Recipe
from napo_loss.objective.recipes import METHODS
from napo_loss.trl import NaPOConfig, NaPOTrainer
from napo_loss.trl.config import REFUSED
from trainers import NAMES, QUIET, TRL, Version, arguments, moved, trainer_for

pytestmark = QUIET


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
    known = honoured | set(REFUSED)
    assert own <= known
    assert own == known or Version("1.16") > TRL  # older ones have fewer


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
        ({"q_over": "step"}, r"q_over must be one of \['micro_batch', 'batch'\], got 'step'"),
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


# A recipe beside any DPOConfig.


def recipe_of(recipe, folder, config=DPOConfig, columns=NAMES, **options):
    data = tiny.text_pairs(4).remove_columns([name for name in NAMES if name not in ["rejected", *columns]])
    trainer = NaPOTrainer(
        moved(tiny.llama()), tiny.llama(), arguments(config, folder, **options), recipe=recipe, train_dataset=data,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert set(trainer.recipe.named) == set(trainer.negatives)
    return trainer


def test_any_dpoconfig_has_the_defaults_of_ours(tmp_path):
    for columns in (["rejected"], ["rejected", "image_only"], NAMES):
        theirs = recipe_of(None, tmp_path, columns=columns, beta=0.3)
        ours = recipe_of(None, tmp_path, NaPOConfig, columns=columns, beta=0.3)
        assert theirs.recipe == ours.recipe
        assert theirs.napo.beta == 0.3
        for a, b in zip(theirs.state.log_history[:2], ours.state.log_history[:2], strict=True):
            assert [a[name] for name in b if "runtime" not in name] == [b[name] for name in b if "runtime" not in name]


@dataclasses.dataclass
class Theirs(DPOConfig):
    """As axolotl has one: fields of its own."""

    dpo_norm_loss: bool | None = False
    chat_template: str | None = None


@pytest.mark.parametrize("config", quick([Theirs], [DPOConfig, NaPOConfig, Theirs]))
def test_a_recipe_in_place_of_settings(config, tmp_path):
    assert recipe_of("paper", tmp_path, config).recipe == METHODS["paper"]
    assert recipe_of("scale_free", tmp_path, config, ["rejected"]).recipe.named["rejected"].estimator == "moment"
    given = Recipe({"image_only": {"q": 0.3}, "rejected": {"alpha": 0.5}}, weights="dynamic", decay=0.5)
    trainer = recipe_of(given, tmp_path, config)
    assert trainer.negatives == ["image_only", "rejected"]
    assert trainer.recipe == given
    assert float(trainer.state.log_history[0]["napo/q/image_only"]) == pytest.approx(0.3)
    assert trainer.napo.previous_moments.shape == (2, 2)
    one_for_all = recipe_of(Recipe(Negative(alpha=0.2, weight=0.5)), tmp_path, config)
    assert one_for_all.negatives == NAMES
    assert set(one_for_all.recipe.named.values()) == {Negative(alpha=0.2, weight=0.5)}
    by_name = recipe_of(Recipe(sft_weight=0.1), tmp_path, config)
    assert by_name.recipe == dataclasses.replace(METHODS["released"], sft_weight=0.1)
    assert recipe_of(Recipe(weights="fixed"), tmp_path, config).recipe.weights == "fixed"


def test_a_recipe_and_settings_that_contradict_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe='paper' and NaPOConfig\(q_decay=0\.9\) say different things about the loss"
    ):
        recipe_of("paper", tmp_path, NaPOConfig, q_decay=0.9)
    with pytest.raises(ValueError, match=r"recipe=Recipe\(.*\) and NaPOConfig\(negatives=.*\) say different things"):
        recipe_of(Recipe({"rejected": {"q": 0.3}}), tmp_path, NaPOConfig, negatives={"image_only": {}})
    with pytest.raises(ValueError, match=r"recipe='paper' and NaPOConfig\(method='scale_free'\) say different"):
        recipe_of("paper", tmp_path, NaPOConfig, method="scale_free")
    agreed = recipe_of(
        dataclasses.replace(METHODS["paper"], decay=0.5), tmp_path, NaPOConfig, method="paper", q_decay=0.5
    )
    assert agreed.recipe.decay == 0.5
    apart = recipe_of("paper", tmp_path, NaPOConfig, q_over="batch", token_metrics=False, learning_rate=0.1)
    assert apart.recipe == dataclasses.replace(METHODS["paper"], q_from="all_pairs")
    assert "entropy" not in apart.state.log_history[0]


def test_what_is_no_recipe_and_no_arguments(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe must be a Recipe or one of \['released', 'paper', 'scale_free'\], got 'mine'"
    ):
        recipe_of("mine", tmp_path)
    with pytest.raises(TypeError, match=r"recipe must be a Recipe or one of .*, got 0\.5"):
        recipe_of(0.5, tmp_path)
    with pytest.raises(ValueError, match=r"the dataset lacks the column 'question_only'"):
        recipe_of(METHODS["released"], tmp_path, columns=["rejected"])
    with pytest.raises(TypeError, match=r"args must be a NaPOConfig or another DPOConfig, got TrainingArguments"):
        recipe_of("paper", tmp_path, TrainingArguments)


@pytest.mark.parametrize(("name", "value"), [("loss_type", "ipo"), ("ld_alpha", 0.5), ("label_smoothing", 0.1)])
def test_options_of_other_losses_are_refused_in_any_dpoconfig(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect on the NaPO loss and is refused"):
        recipe_of("paper", tmp_path, **{name: value})


def test_token_metrics_can_be_left_out(tmp_path):
    with_them, without = (trainer_for("text", tmp_path, token_metrics=x, max_steps=1) for x in (True, False))
    for trainer in (with_them, without):
        trainer.train()
    a, b = with_them.state.log_history[0], without.state.log_history[0]
    assert set(a) - set(b) == {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert a["loss"] == b["loss"]
    assert a["num_tokens"] == b["num_tokens"] > 0
