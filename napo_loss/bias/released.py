"""The parquet files that the released code trains on, to and from the columns that the trainer takes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from napo_loss.bias.settings import KINDS
from napo_loss.bias.stored import (
    LISTED,
    answer_of,
    check_columns,
    check_filled,
    check_schema,
    parse_logps,
    parsed_columns,
    question_of,
    reference_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset

FILLED = {"origin_dataset": "", "origin_split": "{}", "image_path": ""}
"""What the released loader reads of each row for its records, beside ``idx``: an empty JSON object for the split."""


def read_released(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    per_token: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """The released data, or the RLAIF-V data it is made from, with the columns that the trainer takes.

    ============================  ==================================================================================
    in the file                   in the dataset
    ============================  ==================================================================================
    ``question``                  ``prompt``: one user turn, its content a string; the chat template adds the image
    ``chosen``, ``rejected``      the same, each as one assistant turn; so are ``question_only`` and ``image_only``,
                                  which may be missing (:func:`~napo_loss.bias.add_biased_negatives` makes them)
    ``image``                     ``image``: RGB when it is looked at; the stored bytes stay as they are
    ``logps``, if it is there     ``ref_<name>_logps`` and ``ref_<name>_avg_logps`` (float64): sum and mean over the
                                  answer's tokens; with ``per_token`` also ``ref_<name>_per_token_logps`` (a list)
    all others                    the same
    ============================  ==================================================================================

    ``logps`` is a JSON object ``{"logps": [...]}``, or the list itself: sum, mean and per-token list of ``chosen``,
    then of ``rejected`` (RLAIF-V stops here, at 6 entries), ``image_only`` and ``question_only`` (12). The per-token
    lists cover the whole padded sequence, the image's and the prompt's tokens too: they do not add up to the sum.

    The log-probs are those of the model, template and tokenisation that wrote them: LLaVA-1.5's in the released run,
    in bfloat16. They are no reference for a policy that reads the same row in any other way.

    Args:
        path: one parquet file, or several with the same columns.
        per_token: keep the per-token lists, which :func:`write_released` needs; some thousand numbers a row.
        cache_dir: where ``datasets`` keeps the copy that it reads from as needed. ``None``: in its own folder.

    Returns:
        A dataset with the rows of all files, in their order.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for missing columns, other types, files without rows, rows without text or image bytes, and
            ``logps`` of any other layout, with the row and what was found.

    Example:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> row = {"prompt": "What is it?", "chosen": "A bear.", "rejected": "A cat.", "image": Image.new("L", (2, 2))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_released(Dataset.from_list([row]), f"{folder}/logp.parquet")
        ...     read_released(f"{folder}/logp.parquet", cache_dir=folder)[0]["rejected"]
        [{'role': 'assistant', 'content': 'A cat.'}]

    Source: the released code, ``bias_datasets_trainer.py`` (``keys_list``, ``RLAIFVBiasDataset``) and
    ``muffin_inference_logp.py`` (``write_logp_to_preference_parquet``). The script there that makes the data writes
    ``question_only_None`` where the trainer reads ``question_only``: rename the column.
    """
    from datasets import Dataset, Image, concatenate_datasets

    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    names = check_schema(paths)
    folder: Any = None if cache_dir is None else str(cache_dir)  # None is its default, which its annotation forgets
    stored: Any = Dataset.from_parquet([str(p) for p in paths], cache_dir=folder)
    check_filled(stored, names)
    answers = [name for name in LISTED if name in names]
    listed = LISTED[: len(parse_logps(stored[0]["logps"], 0)) // 3] if "logps" in names else ()
    if missing := [name for name in listed if name not in answers]:
        raise ValueError(f"logps has entries for {missing}, but the columns are {stored.column_names}")
    made = stored.select_columns(names).map(
        trainer_columns,
        batched=True,
        with_indices=True,
        fn_kwargs={"answers": answers, "listed": listed, "per_token": per_token},
        remove_columns=names,
        features=trainer_features(answers, listed, per_token),
        load_from_cache_file=False,
    )
    rest = stored.remove_columns(names).cast_column("image", Image(mode="RGB"))
    return concatenate_datasets([made, rest], axis=1)


def write_released(dataset: Dataset, path: str | os.PathLike) -> None:
    """One parquet file in the released format, the inverse of :func:`read_released`.

    Its columns: ``question, chosen, rejected, image {bytes, path}``, those of ``question_only, image_only`` that are
    there, ``logps`` where the dataset has reference log-probs, ``origin_dataset, origin_split, idx, image_path``,
    which the released loader reads (made up where missing: empty, and the row's number), and all others as they are.
    Images keep the bytes they are stored with, whatever their mode: the released code converts to RGB.

    That loader looks for ``*logp*.parquet`` in ``<data_dir>-7b-logp`` and takes their ``logps``. Where it finds none,
    it reads ``data_dir`` and computes them. So a file without ``logps`` goes into ``data_dir``.

    Args:
        dataset: ``prompt`` (one user turn, or plain text, of which role markers and ``<image>`` are taken off),
            ``chosen``, ``rejected``, ``question_only`` and ``image_only`` (strings, or one assistant turn),
            ``image``, or ``images`` with one in each row. Reference log-probs either with all three columns
            ``ref_<name>_logps``, ``ref_<name>_avg_logps`` and ``ref_<name>_per_token_logps`` for every answer, or not
            at all: the released collator reads all three.
        path: of the file, in a folder that exists; an older file is overwritten.

    Raises:
        TypeError: where ``dataset`` is none, or its images are not of the ``Image`` feature.
        ValueError: for missing columns, an incomplete set of log-probs, several turns or several images in a row.

    Example:
        See :func:`read_released`.
    """
    from datasets import Features, Image, List, concatenate_datasets
    from datasets.table import embed_table_storage

    answers, listed = check_columns(dataset)
    image = "image" if "image" in dataset.column_names else "images"
    references = [c for name in LISTED for c in reference_columns(name) if c in dataset.column_names]
    taken = ["prompt", *answers, *references]
    made = dataset.select_columns(taken).map(
        released_columns,
        batched=True,
        with_indices=True,
        fn_kwargs={"answers": answers, "listed": listed},
        remove_columns=taken,
        features=released_features(answers, listed),
        load_from_cache_file=False,
    )
    pictures = dataset.select_columns(image)
    if image == "images" or any(chunk.field("bytes").null_count for chunk in dataset.data.column(image).chunks):
        pictures = pictures.with_format("arrow").map(embed_table_storage, batched=True, load_from_cache_file=False)
        pictures = pictures.with_format(None)
    if image == "images":
        pictures = pictures.cast_column("images", List(Image(decode=False))).map(
            only_image,
            with_indices=True,
            remove_columns="images",
            features=Features({"image": Image()}),
            load_from_cache_file=False,
        )
    rest = dataset.remove_columns([*taken, image])
    for column, value in FILLED.items():
        if column not in rest.column_names:
            made = made.add_column(column, [value] * len(dataset))
    if "idx" not in rest.column_names:
        made = made.add_column("idx", list(range(len(dataset))))
    parts = [made, pictures, rest] if rest.column_names else [made, pictures]
    whole = concatenate_datasets(parts, axis=1)
    check_filled(whole, [])
    first = [c for c in ("question", "chosen", "rejected", "image", *KINDS, "logps") if c in whole.column_names]
    whole.select_columns([*first, *(c for c in whole.column_names if c not in first)]).to_parquet(str(path))


def trainer_columns(
    batch: dict[str, list], rows: list[int], answers: Sequence[str], listed: Sequence[str], per_token: bool
) -> dict[str, list]:
    columns = {"prompt": [[{"role": "user", "content": x}] for x in batch["question"]]}
    columns |= {name: [[{"role": "assistant", "content": x}] for x in batch[name]] for name in answers}
    return columns | (parsed_columns(batch["logps"], rows, listed, per_token) if listed else {})


def trainer_features(answers: Sequence[str], listed: Sequence[str], per_token: bool) -> Any:
    from datasets import Features, List, Value

    turns = List({"role": Value("string"), "content": Value("string")})
    number = Value("float64")
    columns = {"prompt": turns, **dict.fromkeys(answers, turns)}
    for name in listed:
        total, mean, tokens = reference_columns(name)
        columns |= {total: number, mean: number, **({tokens: List(number)} if per_token else {})}
    return Features(columns)


def released_columns(
    batch: dict[str, list], rows: list[int], answers: Sequence[str], listed: Sequence[str]
) -> dict[str, list]:
    columns = {"question": [question_of(x, i) for x, i in zip(batch["prompt"], rows, strict=True)]}
    columns |= {name: [answer_of(x, name, i) for x, i in zip(batch[name], rows, strict=True)] for name in answers}
    if listed:
        values = zip(*(batch[column] for name in listed for column in reference_columns(name)), strict=True)
        columns["logps"] = [json.dumps({"logps": entries}) for entries in values]
    return columns


def released_features(answers: Sequence[str], listed: Sequence[str]) -> Any:
    from datasets import Features, Value

    return Features(dict.fromkeys(["question", *answers, *(["logps"] if listed else [])], Value("string")))


def only_image(row: dict[str, Any], index: int) -> dict[str, Any]:
    images = row["images"] or []
    if len(images) != 1:
        raise ValueError(f"row {index}: the released format holds one image, the row has {len(images)}")
    return {"image": images[0]}
