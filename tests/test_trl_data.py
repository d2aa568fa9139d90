"""What NaPOTrainer makes of datasets: further negatives are prepared as TRL prepares `rejected`."""

import copy
import pickle

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessorPil
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

import tiny
from napo_loss.trl import NaPOConfig, NaPOTrainer
from napo_loss.trl.data import NegativesCollator, OncePerPrompt, tokenize_negative
from trainers import NAMES, QUIET, TRL, arguments, text_trainer, trainer_for

pytestmark = QUIET


def conversation(example):
    roles = {"prompt": "user"}
    return {k: [{"role": roles.get(k, "assistant"), "content": v.strip()}] for k, v in example.items()}


@pytest.mark.parametrize("style", ["plain", "conversational"])
@pytest.mark.parametrize("beginning", ["", "s"])  # "s" merges with the last word of the prompt: the prompt gets shorter
def test_a_further_negative_is_tokenised_like_rejected(style, beginning, tmp_path):
    if beginning and style == "plain" and not hasattr(trl.data_utils, "common_prefix_length"):
        pytest.skip(f"TRL {TRL} takes the completion from where the prompt would have ended")
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


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {}), ({"chat_template_kwargs": None}, {}), ({"chat_template_kwargs": {"polite": True}}, {"polite": True}),
        ({"tools": '[{"name": "look"}]'}, {"tools": [{"name": "look"}]}),
        ({"tools": [{"name": "look"}], "chat_template_kwargs": {}}, {"tools": [{"name": "look"}]}),
    ],
)  # fmt: skip
def test_what_a_row_tells_the_template_reaches_further_negatives(columns, options):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ 'big ' if polite }}{{ 'small ' if tools }}" + tiny.CHAT
    prompt, other = [{"role": "user", "content": "what is"}], [{"role": "assistant", "content": "cat"}]

    def ids(messages, **more):
        return list(tokenizer.apply_chat_template(messages, return_dict=True, **options, **more)["input_ids"])

    row = {"prompt": prompt, "other": other, "prompt_ids": ids(prompt, add_generation_prompt=True), **columns}
    made = tokenize_negative(row, "other", [], tokenizer, tokenizer.eos_token)
    assert made["prompt_ids"] + made["other_ids"] == ids(prompt + other)
    assert made["prompt_ids"] == row["prompt_ids"]


def test_streams(tmp_path):
    whole, stream = tiny.text_pairs(4), tiny.text_pairs(4).to_iterable_dataset()
    trainers = [text_trainer(x, tmp_path, extra={"eval_dataset": x}) for x in (whole, stream)]
    a, b = (t.evaluate()["eval_loss"] for t in trainers)
    assert a == pytest.approx(b)
    trainers[1].train()


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


@pytest.mark.parametrize("name", ["chosen", "prompt", "margins", "accuracies"])
def test_names_with_another_meaning_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"no negative can be called '{name}'"):
        text_trainer(tiny.text_pairs(4), tmp_path, negatives={"rejected": {}, name: {}})
