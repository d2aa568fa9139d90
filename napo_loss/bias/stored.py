"""One row of the released data: its log-probs as JSON, its turns as plain text, and the checks of a file of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from napo_loss.bias.removal import without_placeholders
from napo_loss.bias.settings import QUESTION

LISTED = ("chosen", "rejected", "image_only", "question_only")
"""In the order of the released ``logps``, which calls the first two ``win`` and ``rej``."""
PARTS = ("logps", "avg_logps", "per_token_logps")


def reference_columns(name: str) -> list[str]:
    """Sum, mean and per-token list of one answer; the first is what the trainer's collator reads."""
    return [f"ref_{name}_{part}" for part in PARTS]


def parse_logps(text: Any, row: int) -> list[Any]:
    """The 6 or 12 entries of a released ``logps``, checked: sum, mean and per-token list of each of :data:`LISTED`."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"row {row}: logps is no JSON, got {str(text)[:80]!r}") from None
    entries = found.get("logps") if isinstance(found, dict) else found
    if isinstance(entries, list) and len(entries) in (6, 12):
        if all(isinstance(x, list) if k % 3 == 2 else type(x) in (int, float) for k, x in enumerate(entries)):
            return entries
        got = [type(x).__name__ for x in entries]
    elif isinstance(entries, list):
        got = f"{len(entries)} entries"
    else:
        got = f"the keys {sorted(found)}" if isinstance(found, dict) else type(found).__name__
    raise ValueError(
        f'row {row}: logps must be a list, or {{"logps": list}}, of 6 or 12 entries: sum, mean and per-token list of '
        f"{', '.join(LISTED)}; got {got}"
    )


def parsed_columns(batch: Sequence[Any], rows: Sequence[int], names: Sequence[str], per_token: bool) -> dict[str, list]:
    """Columns of log-probs from a batch of JSON texts; every row lists the same answers."""
    columns: dict[str, list] = {column: [] for name in names for column in reference_columns(name)}
    for text, row in zip(batch, rows, strict=True):
        entries = parse_logps(text, row)
        if len(entries) != len(columns):
            raise ValueError(f"row {row}: logps has {len(entries)} entries, but row 0 has {len(columns)}")
        for column, value in zip(columns, entries, strict=True):
            columns[column].append(value)
    return {column: x for column, x in columns.items() if per_token or not column.endswith(PARTS[2])}


def question_of(prompt: Any, row: int) -> str:
    """The question of one turn: of a conversation its text, of plain text what its role markers leave."""
    if prompt is None:
        raise ValueError(f"row {row}: prompt is null")
    if isinstance(prompt, str):
        match = re.search(QUESTION, prompt)
        question = without_placeholders(match["question"] if match else prompt, "<image>").strip()
        if "ASSISTANT:" not in question:
            return question
    elif [m["role"] for m in prompt] == ["user"]:
        return content_text(prompt[0]["content"])
    turns = "several turns" if isinstance(prompt, str) else [m["role"] for m in prompt]
    raise ValueError(f"row {row}: the released format holds one question, the prompt has {turns}")


def answer_of(answer: Any, name: str, row: int) -> str:
    if answer is None:
        raise ValueError(f"row {row}: {name} is null")
    if isinstance(answer, str):
        return answer
    if [m["role"] for m in answer] != ["assistant"]:
        turns = [m["role"] for m in answer]
        raise ValueError(f"row {row}: the released format holds one answer, {name} has the turns {turns}")
    return content_text(answer[0]["content"])


def content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def check_schema(paths: Sequence[Any]) -> list[str]:
    """The columns of text in every file, or an error that says what a file has instead."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not paths:
        raise ValueError("path names no file")
    found = []
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        file = pq.read_metadata(path)
        if not file.num_rows:
            raise ValueError(f"{path} holds no rows")
        schema = file.schema.to_arrow_schema()
        if missing := [name for name in ("question", "chosen", "rejected", "image") if name not in schema.names]:
            raise ValueError(f"{path} lacks the columns {missing}, it has {schema.names}")
        if taken := {"prompt", "images"} & set(schema.names):
            raise ValueError(f"{path} is no released file: it has a column {min(taken)!r} already")
        names = [name for name in ("question", *LISTED, "logps") if name in schema.names]
        for name in names:
            kind = schema.field(name).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: the column {name!r} must hold strings, it holds {kind}")
        kind: Any = schema.field("image").type
        inside = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None
        if inside is None or not (pa.types.is_binary(inside) or pa.types.is_large_binary(inside)):
            raise ValueError(f"{path}: the column 'image' must be a struct with 'bytes' (binary), it is {kind}")
        found.append(names)
    for path, names in zip(paths, found, strict=True):
        if names != found[0]:
            raise ValueError(f"{path} has the columns {names}, but {paths[0]} has {found[0]}")
    return found[0]


def check_columns(dataset: Any) -> tuple[list[str], list[str]]:
    """The answers of a dataset in the trainer's columns, and again those with log-probs, which are all or none."""
    from datasets import Dataset, Image, List

    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset (one split), got {type(dataset).__name__}")
    columns = dataset.column_names
    if missing := [name for name in ("prompt", "chosen", "rejected") if name not in columns]:
        raise ValueError(f"dataset lacks the columns {missing}, it has {columns}")
    if taken := {"question", "logps"} & set(columns):
        raise ValueError(f"dataset has a column {min(taken)!r}, which is to be made from the others: remove it")
    images = [(name, dataset.features[name]) for name in ("image", "images") if name in columns]
    if len(images) != 1:
        raise ValueError(f"dataset needs a column 'image' or 'images', it has {columns}")
    [(name, feature)] = images
    if not isinstance(feature.feature if name == "images" and isinstance(feature, List) else feature, Image):
        raise TypeError(f"the column {name!r} of dataset must hold images (the Image feature), it is {feature}")
    answers = [name for name in LISTED if name in columns]
    wanted = [column for name in answers for column in reference_columns(name)]
    missing = [column for column in wanted if column not in columns]
    if len(missing) == len(wanted):
        return answers, []
    if missing or len(answers) == 3:
        raise ValueError(
            f"logps holds sum, mean and per-token list for chosen and rejected, or for {', '.join(LISTED)}; "
            f"dataset has {answers} and lacks {missing}: add them, or remove its ref_* columns to write no logps"
        )
    return answers, answers


def check_filled(dataset: Any, names: Sequence[str]) -> None:
    """No null among the texts, and an image's bytes in every row; read from validity bits, not from the values."""
    for name in names:
        check_valid(dataset.data.column(name).chunks, f"{name} is null")
    images = dataset.data.column("image").chunks
    check_valid(images, "image is null")
    check_valid([chunk.field("bytes") for chunk in images], "image has no bytes")


def check_valid(chunks: Sequence[Any], complaint: str) -> None:
    row = 0
    for chunk in chunks:
        if chunk.null_count:
            raise ValueError(f"row {row + chunk.is_valid().to_pylist().index(False)}: {complaint}")
        row += len(chunk)
