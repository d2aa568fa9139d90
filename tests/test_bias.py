"""Biased negatives with a real (tiny, random) LLaVA: what the model gets to see, what comes back, and resuming."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
from filelock import FileLock  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

import processes  # noqa: E402
from napo_loss.bias import BiasSettings, add_biased_negatives  # noqa: E402
from napo_loss.bias.answers import Answers  # noqa: E402
from napo_loss.bias.removal import remove_image, without_placeholders  # noqa: E402

TEXT = "USER: ASSISTANT: what who is this that here ? Describe the image. a b c d e f"
WORDS = ["<pad>", "<eos>", "<unk>", "<image>", *TEXT.split()]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }} {% endfor %}{% endif %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)
SHORT = BiasSettings(max_new_tokens=4)
RELEASED = replace(BiasSettings.released(), max_new_tokens=4)


@pytest.fixture(scope="module")
def processor():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=32, initializer_factor=20.0),
        text_config=LlamaConfig(**size, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, initializer_range=0.5),
        image_token_index=3, vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def strings(n: int = 6, images: int = 1):
    questions = ["what is this ?", "who is that ?", "what is here ?"]
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"USER: {'<image> ' * images}\n{questions[i % 3]} ASSISTANT:" for i in range(n)],
            "images": [[picture(10 * i + k) for k in range(images)] for i in range(n)],
            "chosen": ["a b"] * n,
            "rejected": ["c"] * n,
        },
        features=datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "chosen": datasets.Value("string"),
                "rejected": datasets.Value("string"),
            }
        ),
    )


def conversations(parts: bool, n: int = 3):
    def content(text, image=False):
        return ([{"type": "image"}] * image + [{"type": "text", "text": text}]) if parts else text

    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": content("what is this ?" if i else "who is that ?", True)}],
                "image": picture(i),
                "chosen": [{"role": "assistant", "content": content("a b")}],
                "rejected": [{"role": "assistant", "content": content("c")}],
            }
            for i in range(n)
        ]
    )


WITHOUT_IMAGES = datasets.Dataset.from_dict({"prompt": ["<image> what ?"], "image": ["a.png"], "chosen": ["a"]})


@pytest.fixture
def seen(model, monkeypatch):
    """What reaches ``model.generate``, one entry per batch."""
    batches, generate = [], type(model).generate

    def record(self, **inputs):
        batches.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(type(model), "generate", record)
    return batches


def test_each_negative_misses_its_modality(model, processor, seen):
    data = strings()
    result = add_biased_negatives(data, model, processor, image_removal="blank", settings=SHORT, batch_size=6)
    assert result.column_names == [*data.column_names, "question_only", "image_only"]
    assert result.select_columns(data.column_names)[:]["prompt"] == data["prompt"]
    assert all(isinstance(x, str) for x in [*result["question_only"], *result["image_only"]])

    blind, deaf = seen
    assert (blind["pixel_values"] == blind["pixel_values"][0]).all()
    assert result["question_only"][:3] == result["question_only"][3:]  # the questions repeat, the images do not
    assert (deaf["input_ids"] == deaf["input_ids"][0]).all()
    assert not (deaf["pixel_values"] == deaf["pixel_values"][0]).all()
    text = processor.tokenizer.decode(deaf["input_ids"][0])
    assert text == "USER: " + "<image> " * 4 + "Describe the image. ASSISTANT:"


@pytest.fixture
def looks(model):
    """How often the vision tower ran."""
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def decoded(processor, batch):
    return [processor.tokenizer.decode(ids, skip_special_tokens=False) for ids in batch["input_ids"]]


def test_as_released_one_negative_has_no_image_and_the_other_no_text(model, processor, seen, looks):
    data = strings()
    result = add_biased_negatives(data, model, processor, settings=RELEASED, batch_size=6)
    blind, deaf = seen
    assert set(blind) == {"input_ids", "attention_mask", "generation_config"}
    questions = ["USER: what is this ? ASSISTANT:", "USER: who is that ? ASSISTANT:", "USER: what is here ? ASSISTANT:"]
    assert decoded(processor, blind) == [*questions, *questions]
    assert decoded(processor, deaf) == ["USER: " + "<image> " * 4 + "ASSISTANT:"] * 6
    images = processor.image_processor([row["images"][0] for row in data], return_tensors="pt")
    assert (deaf["pixel_values"] == images["pixel_values"]).all()
    assert len(looks) == 1

    for ids, answer in zip(processor.tokenizer(questions)["input_ids"], result["question_only"][:3], strict=True):
        inputs = torch.tensor([ids])
        alone = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), num_beams=3, max_new_tokens=4, do_sample=False
        )
        assert processor.tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("parts", [True, False])
def test_conversations_as_released(model, processor, seen, looks, parts):
    add_biased_negatives(conversations(parts), model, processor, settings=RELEASED, batch_size=3)
    blind, deaf = seen
    assert "pixel_values" not in blind
    assert [x.split() for x in decoded(processor, blind)] == [
        ["<unk>", *question.split(), "ASSISTANT:"] for question in ("who is that ?", "what is this ?", "what is this ?")
    ]
    assert [x.split() for x in decoded(processor, deaf)] == [["<unk>", *["<image>"] * 4, "ASSISTANT:"]] * 3
    assert deaf["pixel_values"].shape[0] == 3
    assert len(looks) == 1


def test_several_images_as_released(model, processor, seen):
    add_biased_negatives(strings(3, images=2), model, processor, settings=RELEASED, batch_size=3)
    blind, deaf = seen
    assert (blind["input_ids"] != 3).all()
    assert decoded(processor, deaf) == ["USER: " + "<image> " * 8 + "ASSISTANT:"] * 3


def test_an_argument_overrides_the_settings(model, processor, seen):
    for removal in ("blank", None):
        kwargs = {"settings": RELEASED, "kinds": ["question_only"], "image_removal": removal}
        add_biased_negatives(strings(2), model, processor, **kwargs)
    assert ["pixel_values" in batch for batch in seen] == [True, False]
    add_biased_negatives(strings(2), model, processor, settings=SHORT, kinds=["question_only"], image_removal="omit")
    assert "pixel_values" not in seen[2]
    assert seen[2]["generation_config"].num_beams == 1


def test_what_the_released_code_runs():
    settings = BiasSettings.released()
    assert (settings.num_beams, settings.temperature, settings.max_new_tokens) == (3, 0.0, 1024)
    assert (settings.image_removal, settings.instruction) == ("omit", None)


def test_beams_are_beams_whatever_the_batch_and_the_checkpoint_say(model, processor, seen, monkeypatch):
    greedy = add_biased_negatives(strings(6), model, processor, settings=replace(RELEASED, num_beams=1), batch_size=6)
    whole = add_biased_negatives(strings(6), model, processor, settings=RELEASED, batch_size=6)
    assert whole["image_only"] != greedy["image_only"]
    for name, value in {"num_beams": 5, "length_penalty": 9.0, "early_stopping": True, "do_sample": True}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    for batch_size in (1, 4):
        again = add_biased_negatives(strings(6), model, processor, settings=RELEASED, batch_size=batch_size)
        assert again["question_only"] == whole["question_only"]
        assert again["image_only"] == whole["image_only"]
    used = seen[-1]["generation_config"]  # what is None there, the checkpoint decides
    assert (used.num_beams, used.length_penalty, used.early_stopping, used.do_sample) == (3, 1.0, False, False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("USER: <image> <image>\nWhat? ASSISTANT:", "USER: What? ASSISTANT:"),
        ("Is <image> like <image>?", "Is like ?"),
        ("What?\n<image>", "What?\n"),
        ("<img><image></img> What < 3?", "What < 3?"),
        ("<im_start>user <image>What?", "<im_start>user What?"),
    ],
)
def test_prompts_without_placeholders(prompt, expected):
    assert without_placeholders(prompt, "<image>") == expected


@pytest.mark.parametrize("mode", ["mask", "noise", "blank", "crop"])
@pytest.mark.parametrize("colour", ["RGB", "L"])
def test_image_removal(mode, colour):
    image = picture(0).convert(colour)
    first, second = (np.asarray(remove_image(image, mode, np.random.default_rng(s))) for s in (0, 1))
    assert first.shape == np.asarray(image).shape
    if mode in ("mask", "blank"):
        assert (first == first[0, 0]).all()
        assert np.allclose(first[0, 0], np.asarray(image).mean((0, 1)) if mode == "mask" else 0, atol=0.51)
    else:
        assert (first != second).any()
        again = np.asarray(remove_image(image, mode, np.random.default_rng(0)))
        assert (first == again).all()


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [((), 0.01, 0.2), ((BiasSettings().crop_area,), 0.01, 0.2), (((0.3, 0.4),), 0.3, 0.4)],
)
def test_crop_keeps_its_share_of_the_area(given, low, high):
    """Shares of the area are drawn evenly between the bounds, by default 1 and 20 %: the released helper's."""
    corner = Image.fromarray(np.indices((120, 120)).sum(0).astype(np.uint8))
    shares = []
    for seed in range(200):
        crop = np.asarray(remove_image(corner, "crop", np.random.default_rng(seed), *given), dtype=float)
        height, width = np.ptp(crop[:, 0]) + 1, np.ptp(crop[0]) + 1  # one grey level a pixel
        shares.append(height * width / 120**2)
        assert 0.7 < width / height < 1.43  # 3/4 to 4/3, and a pixel
    assert low * 0.8 < min(shares) < low + 0.03 * (high - low) + 0.003
    assert high - 0.03 * (high - low) - 0.01 < max(shares) < high * 1.05
    assert abs(np.mean(shares) - (low + high) / 2) < 0.1 * (high - low)


@pytest.mark.parametrize("mode", ["noise", "crop"])
def test_noise_and_crops_depend_on_the_row_alone(model, processor, seen, mode):
    for batch_size in (2, 5, 2):
        kwargs = {"kinds": ["question_only"], "image_removal": mode, "settings": SHORT, "batch_size": batch_size}
        add_biased_negatives(strings(5), model, processor, **kwargs)
    pixels = torch.cat([batch["pixel_values"] for batch in seen]).view(3, 5, -1)
    assert (pixels == pixels[0]).all()
    assert len({tuple(x.tolist()) for x in pixels[0]}) == 5


@pytest.mark.parametrize("parts", [True, False])
def test_conversations(model, processor, seen, parts):
    data = conversations(parts)
    result = add_biased_negatives(data, model, processor, settings=SHORT, batch_size=3)
    for kind in ("question_only", "image_only"):
        for answer in result[kind]:
            assert [m["role"] for m in answer] == ["assistant"]
            assert isinstance(answer[0]["content"], list if parts else str)
    assert seen[0]["pixel_values"].shape[0] == 3
    questions = [processor.tokenizer.decode(ids) for ids in seen[0]["input_ids"]]
    assert "who is that ?" in questions[0]
    assert "Describe the image." in processor.tokenizer.decode(seen[1]["input_ids"][0])
    assert all("?" not in processor.tokenizer.decode(ids) for ids in seen[1]["input_ids"])


def test_several_images(model, processor, seen):
    add_biased_negatives(strings(3, images=2), model, processor, settings=SHORT, batch_size=3)
    for batch in seen:
        assert batch["pixel_values"].shape[0] == 6
        assert (batch["input_ids"] == 3).sum().item() == 3 * 2 * 4


def test_prompts_are_padded_on_the_left(model, processor):
    data = strings(3)
    prompts = [data[0]["prompt"], data[1]["prompt"].replace("who is that ?", "who ?"), data[2]["prompt"]]
    data = data.remove_columns("prompt").add_column("prompt", prompts)
    together, alone = (add_biased_negatives(data, model, processor, settings=SHORT, batch_size=b) for b in (3, 1))
    assert together["question_only"] == alone["question_only"]


def test_greedy_is_greedy_whatever_the_checkpoint_says(model, processor, monkeypatch):
    plain = add_biased_negatives(strings(), model, processor, settings=SHORT)
    for name, value in {"do_sample": True, "temperature": 5.0, "num_beams": 2, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert add_biased_negatives(strings(), model, processor, settings=SHORT)[:] == plain[:]
    sampled = BiasSettings(max_new_tokens=4, temperature=2.0)
    assert add_biased_negatives(strings(), model, processor, settings=sampled)[:] != plain[:]


@pytest.mark.parametrize(
    "settings",
    [replace(SHORT, image_removal="noise"), replace(SHORT, image_removal="noise", temperature=1.5), RELEASED,
     replace(RELEASED, temperature=1.5)],
)  # fmt: skip
def test_an_interrupted_run_continues(model, processor, tmp_path, monkeypatch, settings):
    data, kwargs = strings(9), {"settings": settings, "batch_size": 2}
    whole = add_biased_negatives(data, model, processor, **kwargs)
    generate, calls = type(model).generate, []

    def fail_at_eighth(self, **inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    monkeypatch.setattr(type(model), "generate", fail_at_eighth)
    with pytest.raises(KeyboardInterrupt):
        add_biased_negatives(data, model, processor, cache_dir=tmp_path, **kwargs)
    with (tmp_path / "image_only.jsonl").open("a") as file:
        file.write('"torn in the mid')
    resumed = add_biased_negatives(data, model, processor, cache_dir=tmp_path, **kwargs)
    assert len(calls) == 8 + 3  # five batches of the first kind and two of the second were there
    assert resumed[:]["question_only"] == whole[:]["question_only"]
    assert resumed[:]["image_only"] == whole[:]["image_only"]
    add_biased_negatives(data, model, processor, cache_dir=tmp_path, **kwargs)
    assert len(calls) == 8 + 3


def test_a_cache_serves_one_run_only(model, processor, tmp_path):
    def run(data, **settings):
        settings = BiasSettings(max_new_tokens=2, **settings)
        add_biased_negatives(data, model, processor, settings=settings, kinds=["image_only"], cache_dir=tmp_path)

    run(strings(4))
    run(strings(4))
    with pytest.raises(ValueError, match=r"cache_dir.*instruction"):
        run(strings(4), instruction="what ?")
    for name, value in {"instruction": None, "num_beams": 2, "image_removal": "omit"}.items():
        with pytest.raises(ValueError, match=rf"cache_dir.*{name}"):
            run(strings(4), **{name: value})
    with pytest.raises(ValueError, match=r"cache_dir.*dataset"):
        run(strings(4).select([1, 0, 2, 3]))
    weight = model.model.language_model.norm.weight
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(ValueError, match=r"cache_dir.*model"):
        run(strings(4))
    with torch.no_grad():
        weight.sub_(1.0)


def cached(model, processor, folder, data, **settings):
    options = {"settings": BiasSettings(max_new_tokens=2, **settings), "kinds": ["image_only"], "batch_size": 2}
    return add_biased_negatives(data, model, processor, cache_dir=folder, **options)["image_only"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:2], "null", *lines[2:]], r"line 3 of .*only.jsonl must be \[1, answer\], got 'None'"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], r"line 4 of .*image_only.jsonl must be \[2, answer\]"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], r"line 2 of .* must be \[0, answer\]"),
        (lambda lines: [lines[0], *lines[2:]], r"line 2 of .* must be \[0, answer\]"),
        (lambda lines: [lines[0], json.dumps(["0", "a"]), *lines[2:]], r"line 2 of .* must be \[0, answer\]"),
        (lambda lines: [lines[0], json.dumps([0, 7]), *lines[2:]], r"line 2 of .* must be \[0, answer\]"),
        (lambda lines: [lines[0], json.dumps("as drafts wrote"), *lines[2:]], r"line 2 of .* must be \[0, answer\]"),
        (lambda lines: [*lines[:2], lines[2][:-3], *lines[3:]], "line 3 of .*image_only.jsonl is no JSON"),
        (lambda lines: ["7", *lines[1:]], "line 1 of .*image_only.jsonl describes no run"),
        (lambda lines: ["{", *lines[1:]], "line 1 of .*image_only.jsonl is no JSON"),
        (lambda lines: [*lines, json.dumps([5, "more"])], "has 6 answers for 5 rows"),
    ],
    ids=["null", "doubled", "swapped", "lost", "no index", "no answer", "old", "torn", "no run", "torn run", "more"],
)  # fmt: skip
def test_every_line_of_a_cache_is_checked_and_named(change, message, model, processor, tmp_path):
    data, file = strings(5), tmp_path / "image_only.jsonl"
    cached(model, processor, tmp_path, data)
    file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        cached(model, processor, tmp_path, data)


def test_a_cache_that_was_cut_anywhere_gives_the_same_answers(model, processor, tmp_path):
    data, file = strings(5), tmp_path / "image_only.jsonl"
    for settings in ({}, {"temperature": 1.5}):
        shutil.rmtree(tmp_path)
        whole = cached(model, processor, tmp_path, data, **settings)
        everything = file.read_bytes()
        for size in range(0, len(everything), 29):
            file.write_bytes(everything[:size])
            assert cached(model, processor, tmp_path, data, **settings) == whole
            assert file.read_bytes() == everything


def test_one_process_writes_and_a_complete_cache_is_only_read(model, processor, tmp_path, monkeypatch):
    data, file = strings(4), tmp_path / "image_only.jsonl"
    whole = cached(model, processor, tmp_path, data)
    everything = file.read_bytes()
    with FileLock(f"{file}.lock"):
        monkeypatch.setattr(type(file), "mkdir", lambda *a, **k: pytest.fail("a complete cache was opened to write"))
        assert cached(model, processor, tmp_path, data) == whole
        monkeypatch.undo()
        file.write_bytes(everything[:-10])
        with pytest.raises(RuntimeError, match=r"another process is writing .*image_only\.jsonl"):
            cached(model, processor, tmp_path, data)
        assert file.read_bytes() == everything[:-10]
    assert cached(model, processor, tmp_path, data) == whole


def test_noise_takes_every_value():
    noise = np.asarray(remove_image(Image.new("L", (64, 64)), "noise", np.random.default_rng(0)))
    assert len(np.unique(noise)) == 256


@pytest.mark.parametrize(
    ("own", "eos", "pad", "ends", "padding"),
    [
        (1, 1, 0, [1], 0), (None, 1, None, [1], 1), ([5, 6], 1, None, [5, 6, 1], 5), ([5, 1], 1, 2, [5, 1], 2),
        (7, None, 0, [7], 0), (None, None, 0, None, 0),
    ],
)  # fmt: skip
def test_answers_end_where_model_or_tokenizer_ends_them(own, eos, pad, ends, padding):
    """And are padded by what pads, or else by what ends."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=eos, pad_token_id=pad))
    config = Answers(model, processor, "image_only", BiasSettings()).config
    assert (config.eos_token_id, config.pad_token_id) == (ends, padding)


def test_without_pad_and_end_nothing_can_be_padded():
    processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None, pad_token_id=None))
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        Answers(object(), processor, "image_only", BiasSettings())


def test_model_and_random_state_are_left_as_they_were(model, processor):
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    add_biased_negatives(strings(2), model, processor, settings=BiasSettings(max_new_tokens=2, temperature=1.0))
    assert [module.training for module in model.modules()] == modes
    assert (torch.get_rng_state() == state).all()
    model.eval()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"kinds": "question_only"}, ValueError, "kinds"),
        ({"kinds": []}, ValueError, "kinds"),
        ({"kinds": ["question_only", "both"]}, ValueError, "kinds"),
        ({"image_removal": "blur"}, ValueError, "image_removal"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"dataset": [{"prompt": "x"}]}, TypeError, "dataset"),
        ({"dataset": strings().remove_columns("chosen")}, ValueError, "chosen"),
        ({"dataset": strings().remove_columns("images")}, ValueError, "images"),
        (
            {"dataset": strings().rename_column("rejected", "image_only")},
            ValueError,
            r"has the columns \['image_only'\] already",
        ),
        ({"dataset": strings(2).map(lambda _: {"images": []})}, TypeError, "row 0 of dataset needs PIL images"),
        ({"dataset": WITHOUT_IMAGES}, TypeError, r"row 0 of dataset needs PIL images .*, got \['a.png'\]"),
        ({"model": object()}, TypeError, "model"),
        ({"processor": object()}, TypeError, "processor"),
        ({"dataset": strings(2).map(lambda _: {"prompt": "no placeholder"})}, ValueError, "placeholders"),
        ({"settings": BiasSettings(question_pattern="(?P<question>xyz)")}, ValueError, "question_pattern"),
        ({"settings": RELEASED, "dataset": strings(2).map(lambda _: {"prompt": "<image>"})}, ValueError, "nothing"),
        (
            {
                "image_removal": "omit",
                "dataset": conversations(False).map(
                    lambda _: {"prompt": [{"role": "user", "content": "<image> what is this ?"}]}
                ),
            },
            ValueError,
            "no image part",
        ),
    ],
)
def test_bad_input(model, processor, kwargs, error, match):
    arguments = {"dataset": strings(2), "model": model, "processor": processor} | kwargs
    positional = [arguments.pop(name) for name in ("dataset", "model", "processor")]
    with pytest.raises(error, match=match):
        add_biased_negatives(*positional, **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instruction", " "), ("image_removal", "blur"), ("num_beams", 0), ("num_beams", 1.5), ("max_new_tokens", 0),
        ("num_beams", True), ("temperature", -1.0), ("seed", -1), ("crop_area", (0.3, 0.1)),
        ("crop_area", (0.0, 0.1)), ("crop_area", (0.5, 1.1)), ("question_pattern", "(.*)"),
    ],
)  # fmt: skip
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        BiasSettings(**{name: value})


@pytest.mark.parametrize(
    "edge", [{"crop_area": (0.2, 0.2)}, {"crop_area": (0.5, 1)}, {"seed": 0}, {"num_beams": 1, "max_new_tokens": 1}]
)
def test_settings_at_the_edge_are_taken(edge):
    assert {name: getattr(BiasSettings(**edge), name) for name in edge} == edge


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<image>\nWhat is it?", "<image>\nDescribe the image."),
        ("USER: <image> <image>\nWhat? ASSISTANT:", "USER: <image> <image>\nDescribe the image. ASSISTANT:"),
        (
            "A chat. USER: Is <image> like <image>? ASSISTANT: ",
            "A chat. USER: Describe the image. <image>  <image> ASSISTANT: ",
        ),
        ("<image>", "<image>Describe the image."),
    ],
)
def test_questions_in_plain_text(model, processor, prompt, expected):
    answers = Answers(model, processor, "image_only", BiasSettings())
    assert answers._text(prompt, prompt.count("<image>"), 0) == expected


def test_napo_loss_alone_needs_none_of_this():
    code = "import sys, napo_loss; assert not {'napo_loss.bias', 'datasets', 'transformers', 'trl'} & set(sys.modules)"
    assert processes.run([sys.executable, "-c", code]).returncode == 0
    code = "import sys, napo_loss.bias; assert not {'datasets', 'transformers', 'trl', 'PIL'} & set(sys.modules)"
    assert processes.run([sys.executable, "-c", code]).returncode == 0
