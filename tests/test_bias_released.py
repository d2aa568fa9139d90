"""The released parquet format, on files written the way the released code writes them: with pandas, logps as JSON."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Dataset, Features, Image, List, Value  # noqa: E402
from PIL import Image as PIL  # noqa: E402

from napo_loss.bias import BiasSettings, add_biased_negatives, read_released, write_released  # noqa: E402

NAMES = ("chosen", "rejected", "image_only", "question_only")  # the order of the file's entries
TEXTS = ("question", "chosen", "rejected", "question_only", "image_only")


def png(seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def entries(row: int, answers: int = 4) -> list:
    """Sum, mean and per-token list of each answer, all different."""
    flat = []
    for k in range(answers):
        total = -10.0 * row - k - 1 / 3
        flat += [total, total / 7, [total / 50 - t / 3 for t in range(5 + k)]]
    return flat


def released(n: int = 3, **changes) -> "pd.DataFrame":
    rows = [
        {
            "ds_name": "RLAIF-V",
            "image": {"bytes": png(i, "L" if i == 1 else "RGB"), "path": None},
            "question": f"What is in picture {i}?\nLook, and answer: USER",
            "chosen": f"A bear, {i}.",
            "rejected": f"No bear, {i}.",
            "origin_dataset": "COCO",
            "origin_split": '{"split": "train"}',
            "idx": 40 + i,
            "image_path": f"{i}.png",
            "question_only": f"unseen {i}",
            "image_only": f"unasked {i}",
            "logps": json.dumps({"logps": entries(i)}),
        }
        for i in range(n)
    ]
    return pd.DataFrame([{**row, **changes} for row in rows])


@pytest.fixture
def saved(tmp_path):
    def save(frame, name="logp.parquet"):
        frame.to_parquet(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def read(tmp_path):
    return lambda path, **kwargs: read_released(path, cache_dir=tmp_path / "cache", **kwargs)


def loaded_as_released(path) -> list[dict]:
    """What the released loader takes from a file: names and places are its, the code is ours."""
    found = []
    for sample in pd.read_parquet(path).to_dict("records"):
        row = {f"text/{name}": sample[name] for name in TEXTS}
        row["image"] = PIL.open(io.BytesIO(sample["image"]["bytes"])).convert("RGB").tobytes()
        row["meta"] = [
            sample["origin_dataset"],
            json.loads(sample["origin_split"]),
            sample["idx"],
            sample["image_path"],
        ]
        values = json.loads(sample["logps"])["logps"]
        for k, name in enumerate(("win", "rej", "image_only", "question_only")):
            parts = zip(("logp", "avg_logp", "per_token_logp"), values[3 * k : 3 * k + 3], strict=True)
            row |= {f"ref_{name}_{part}": value for part, value in parts}
        found.append(row)
    return found


def test_the_columns_of_the_trainer(saved, read):
    data = read(saved(released()))
    assert len(data) == 3
    row = data[1]
    assert row["prompt"] == [{"role": "user", "content": "What is in picture 1?\nLook, and answer: USER"}]
    assert row["question_only"] == [{"role": "assistant", "content": "unseen 1"}]
    assert row["image_only"] == [{"role": "assistant", "content": "unasked 1"}]
    assert row["image"].mode == "RGB"  # the file's is grey
    assert (np.asarray(row["image"]) == np.asarray(PIL.open(io.BytesIO(png(1, "L"))).convert("RGB"))).all()
    for k, name in enumerate(NAMES):
        assert row[f"ref_{name}_logps"] == entries(1)[3 * k]
        assert row[f"ref_{name}_avg_logps"] == entries(1)[3 * k + 1]
    assert not any("per_token" in column or column == "logps" for column in data.column_names)
    assert (row["idx"], row["ds_name"]) == (41, "RLAIF-V")
    per_token = read(saved(released()), per_token=True)
    assert per_token[2]["ref_image_only_per_token_logps"] == entries(2)[8]


def test_there_and_back(saved, read, tmp_path):
    before = saved(released())
    write_released(read(before, per_token=True), tmp_path / "again.parquet")
    assert loaded_as_released(tmp_path / "again.parquet") == loaded_as_released(before)
    first, second = (pd.read_parquet(path) for path in (before, tmp_path / "again.parquet"))
    assert set(first.columns) == set(second.columns)
    assert list(second.columns)[:7] == [*TEXTS[:3], "image", *TEXTS[3:], "logps"]
    for name in first.columns:
        if name != "image":
            assert list(first[name]) == list(second[name]), name
    assert [x["bytes"] for x in first["image"]] == [x["bytes"] for x in second["image"]]
    again, once = (read(path, per_token=True) for path in (tmp_path / "again.parquet", before))
    assert again.features["image"] == once.features["image"]
    assert (
        again.select_columns(sorted(set(again.column_names) - {"image"}))[:]
        == once.select_columns(sorted(set(once.column_names) - {"image"}))[:]
    )


def test_the_bare_list_and_six_entries_are_read_too(saved, read):
    frame = released().drop(columns=["question_only", "image_only"])
    frame["logps"] = [json.dumps(entries(i, 2)) for i in range(3)]
    data = read(saved(frame))
    assert data["ref_rejected_logps"][:] == [entries(i, 2)[3] for i in range(3)]
    assert not any("only" in column for column in data.column_names)


def test_whole_numbers_are_numbers(saved, read):
    """JSON tells -5 from -5.0; a column of log-probs does not."""
    frame = released(1)
    frame["logps"] = [json.dumps([-5, -1, [-2, -3]] * 4)]
    data = read(saved(frame), per_token=True)
    assert data.features["ref_chosen_logps"] == datasets.Value("float64")
    assert data.features["ref_chosen_per_token_logps"] == datasets.List(datasets.Value("float64"))
    assert data[0]["ref_image_only_avg_logps"] == -1.0


def test_without_logps(saved, read, tmp_path):
    frame = released().drop(columns=["logps"])
    data = read(saved(frame, "plain.parquet"))
    assert not any(column.startswith("ref_") for column in data.column_names)
    write_released(data, tmp_path / "out.parquet")
    assert set(pd.read_parquet(tmp_path / "out.parquet").columns) == set(frame.columns)


def test_several_files_and_a_file_that_changed(saved, read):
    paths = [saved(released(2), "a.parquet"), saved(released(3), "b.parquet")]
    assert read(paths)["idx"][:] == [40, 41, 40, 41, 42]
    assert read(str(paths[0]))["idx"][:] == [40, 41]
    saved(released(1, idx=7), "a.parquet")
    assert read(paths[0])["idx"][:] == [7]


def test_an_average_that_is_no_number(saved, read):
    """The released code masks every token of an answer where its template and tokeniser disagree: 0 / 0."""
    frame = released(1)
    frame["logps"] = [json.dumps({"logps": [0.0, math.nan, [-1.0], *entries(0)[3:]]})]
    row = read(saved(frame))[0]
    assert row["ref_chosen_logps"] == 0
    assert math.isnan(row["ref_chosen_avg_logps"])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("no JSON", "no JSON, got 'no JSON'"),
        (json.dumps(entries(0, 3)), "got 9 entries"),
        (json.dumps({"logps": entries(0)[:5]}), "got 5 entries"),
        (json.dumps({"win": 1.0, "rej": 2.0}), r"got the keys \['rej', 'win'\]"),
        (json.dumps(3.0), "got float"),
        (json.dumps(entries(0)[::-1]), r"got \['list', 'float', 'float'"),
        (json.dumps([True, *entries(0)[1:]]), r"got \['bool'"),
        (json.dumps([None, *entries(0)[1:]]), r"got \['NoneType'"),
        (json.dumps(entries(0, 2)), "6 entries, but row 0 has 12"),
        (None, "row 1: logps is null"),
    ],
)
def test_other_layouts_are_refused(saved, read, value, found):
    frame = released()
    frame["logps"] = [frame["logps"][0], value, frame["logps"][2]]
    with pytest.raises(ValueError, match=f"row 1: .*{found}" if value else found):
        read(saved(frame))


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (released().drop(columns=["chosen"]), r"lacks the columns \['chosen'\], it has"),
        (released().drop(columns=["image"]), "lacks the columns"),
        (released().rename(columns={"question_only": "question_only_None"}), "entries for .*question_only.*_None"),
        (released(question=3), "'question' must hold strings, it holds int64"),
        (released(image=png(0)), "'image' must be a struct with 'bytes'.* it is binary"),
        (released(image={"path": "a.png"}), "'image' must be a struct with 'bytes'"),
        (released(image={"bytes": "text", "path": ""}), "'image' must be a struct with 'bytes'"),
        (released(prompt="x"), "column 'prompt' already"),
    ],
)
def test_other_files_are_refused(saved, read, frame, match):
    with pytest.raises(ValueError, match=match):
        read(saved(frame))


def test_rows_with_nothing_in_them_are_refused(saved, read):
    for name, value, match in (
        ("rejected", None, "row 1: rejected is null"),
        ("image", None, "row 1: image is null"),
        ("image", {"bytes": None, "path": "1.png"}, "row 1: image has no bytes"),
    ):
        frame = released()
        frame[name] = [frame[name][0], value, frame[name][2]]
        with pytest.raises(ValueError, match=match):
            read(saved(frame))


def test_files_that_are_not_there_or_do_not_match(saved, read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file.*none\.parquet"):
        read(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no file"):
        read([])
    other = saved(released().drop(columns=["logps"]), "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet has the columns"):
        read([saved(released()), other])
    pq.write_table(pa.Table.from_pandas(released()).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet holds no rows"):
        read(tmp_path / "empty.parquet")


def rows(**changes):
    """Two rows of a dataset in plain text with lists of images, as users have them."""
    columns = {
        "prompt": ["<image>\nWhat?", "USER: <image>\nWho is it? ASSISTANT:"],
        "images": [[{"bytes": png(i), "path": None}] for i in range(2)],
        "chosen": ["a", "b"],
        "rejected": ["c", "d"],
        **changes,
    }
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def test_plain_text_and_lists_of_images_are_written(tmp_path, read):
    write_released(rows(), tmp_path / "out.parquet")
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert list(frame.columns[:4]) == ["question", "chosen", "rejected", "image"]
    assert list(frame["question"]) == ["What?", "Who is it?"]
    assert list(frame["chosen"]) == ["a", "b"]
    assert [x["bytes"] for x in frame["image"]] == [png(0), png(1)]
    assert "logps" not in frame.columns
    # what the released loader reads beside them
    assert list(frame["idx"]) == [0, 1]
    assert [json.loads(x) for x in frame["origin_split"]] == [{}, {}]
    assert list(frame["origin_dataset"]) == list(frame["image_path"]) == ["", ""]
    assert read(tmp_path / "out.parquet")["prompt"][1] == [{"role": "user", "content": "Who is it?"}]


def test_parts_and_shuffled_rows_are_written(tmp_path):
    def turn(role, text, image=False):
        parts = [{"type": "image", "text": None}] * image + [{"type": "text", "text": text}]
        return [{"role": role, "content": parts}]

    data = Dataset.from_list(
        [
            {
                "prompt": turn("user", f"What {i}?", image=True),
                "image": PIL.open(io.BytesIO(png(i))),
                **{name: turn("assistant", f"{name} {i}") for name in NAMES},
            }
            for i in range(4)
        ]
    )
    write_released(data.select([3, 1]), tmp_path / "out.parquet")
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert list(frame["question"]) == ["What 3?", "What 1?"]
    assert list(frame["question_only"]) == ["question_only 3", "question_only 1"]
    for image, i in zip(frame["image"], (3, 1), strict=True):
        assert (np.asarray(PIL.open(io.BytesIO(image["bytes"]))) == np.asarray(PIL.open(io.BytesIO(png(i))))).all()


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_in_files_are_written_as_bytes(tmp_path, column):
    (tmp_path / "x.png").write_bytes(png(5))
    path = str(tmp_path / "x.png")
    feature = Image() if column == "image" else List(Image())
    features = Features(dict.fromkeys(("prompt", "chosen", "rejected"), Value("string")) | {column: feature})
    row = {"prompt": "What?", "chosen": "a", "rejected": "b", column: path if column == "image" else [path]}
    write_released(Dataset.from_list([row], features=features), tmp_path / "out.parquet")
    (tmp_path / "x.png").unlink()
    [image] = pd.read_parquet(tmp_path / "out.parquet")["image"]
    assert image["bytes"] == png(5)


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        ([{"prompt": "x"}], TypeError, "datasets.Dataset"),
        (rows().remove_columns("rejected"), ValueError, r"lacks the columns \['rejected'\]"),
        (rows().remove_columns("images"), ValueError, "'image' or 'images'"),
        (rows(image=[png(0), png(1)]), ValueError, "'image' or 'images'"),
        (rows().add_column("question", ["x", "y"]), ValueError, "'question'"),
        (rows(image=["a.png", "b.png"]).remove_columns("images"), TypeError, "'image'.*Image feature"),
        (rows(images=[[], [{"bytes": png(0), "path": None}]]), ValueError, "row 0: .*the row has 0"),
        (rows(images=[[{"bytes": png(0), "path": None}], [None]]), ValueError, "row 1: image"),
        (rows(images=[[{"bytes": png(0), "path": None}], None]), ValueError, "row 1: .*the row has 0"),
        (rows(prompt=["x", None]), ValueError, "row 1: prompt is null"),
        (rows(rejected=["x", None]), ValueError, "row 1: rejected is null"),
        (rows(ref_chosen_logps=[-1.0, -2.0]), ValueError, "lacks .*ref_chosen_avg_logps.*remove its ref_"),
        (rows(prompt=["USER: a ASSISTANT: b USER: c ASSISTANT:", "x"]), ValueError, "row 0: .*several turns"),
        (
            rows(prompt=[[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]] * 2),
            ValueError,
            "system",
        ),
        (rows(chosen=[[{"role": "user", "content": "u"}]] * 2), ValueError, "row 0: .*chosen has the turns"),
    ],
)
def test_other_datasets_are_refused(tmp_path, dataset, error, match):
    with pytest.raises(error, match=match):
        write_released(dataset, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_log_probs_of_three_answers_have_no_place(tmp_path, saved, read):
    data = read(saved(released()), per_token=True)
    data = data.remove_columns([c for c in data.column_names if "image_only" in c])
    with pytest.raises(ValueError, match="logps holds sum, mean"):
        write_released(data, tmp_path / "out.parquet")


def test_the_trainer_takes_what_was_read(saved, read, tmp_path):
    """Four answers and the image; with a collator that is asked to, the file's log-probs as the reference's."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    import tiny
    from napo_loss.trl import NaPOConfig, NaPOTrainer
    from napo_loss.trl.data import NegativesCollator

    data = read(saved(released()))
    names = ["rejected", "question_only", "image_only"]
    collator = NegativesCollator(DataCollatorForVisionPreference(tiny.processor()), names, suffix="", reference=True)
    batch = collator([data[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == batch["pixel_values"].shape[0] == 4 * 3
    order = [NAMES.index(name) for name in ("chosen", *names)]
    expected = [[entries(i)[3 * k] for i in range(3)] for k in order]
    np.testing.assert_allclose(batch["reference_logps"].logps.view(4, 3).numpy(), expected, rtol=1e-6)

    for own, moved in ((None, False), (collator, True)):
        args = NaPOConfig(
            output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=3, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, remove_unused_columns=False,
        )  # fmt: skip
        trainer = NaPOTrainer(
            tiny.llava(), args=args, train_dataset=data, processing_class=tiny.processor(), data_collator=own
        )
        trainer.train()
        assert trainer.negatives == names
        rewards = [trainer.state.log_history[0][f"rewards/{name}"] for name in ("chosen", *names)]
        assert all((abs(x) > 1e-4) == moved for x in rewards)  # the first step: 0 against the model itself


def test_from_rlaif_v_to_a_file_for_the_released_code(saved, read, tmp_path):
    pytest.importorskip("transformers")
    import tiny

    data = read(saved(released().drop(columns=["question_only", "image_only", "logps"])))
    settings = replace(BiasSettings.released(), max_new_tokens=3)
    made = add_biased_negatives(data, tiny.llava(), tiny.processor(), settings=settings, cache_dir=tmp_path / "bias")
    write_released(made, tmp_path / "train.parquet")
    frame = pd.read_parquet(tmp_path / "train.parquet")
    for kind in ("question_only", "image_only"):
        answers = (tmp_path / f"bias/{kind}.jsonl").read_text().splitlines()[1:]
        assert [[row, answer] for row, answer in enumerate(frame[kind])] == [json.loads(line) for line in answers]
    assert list(frame["question"]) == list(released()["question"])
    assert [x["bytes"] for x in frame["image"]] == [x["bytes"] for x in released()["image"]]


BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/bias.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_page_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(compile(block, "docs/bias.md", "exec"), {})
