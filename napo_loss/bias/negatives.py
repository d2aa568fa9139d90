"""Columns of biased negatives for a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from napo_loss.bias.answers import Answers, answer_all, evaluation
from napo_loss.bias.cache import dataset_digest, model_digest
from napo_loss.bias.settings import KINDS, BiasSettings, ImageRemoval

if TYPE_CHECKING:
    from datasets import Dataset


def add_biased_negatives(
    dataset: Dataset,
    model: Any,
    processor: Any,
    *,
    kinds: Sequence[str] = KINDS,
    image_removal: ImageRemoval | None = None,
    settings: BiasSettings | None = None,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """The dataset with one more column per kind of biased negative, each in the format of ``chosen``.

    Args:
        dataset: columns ``prompt``, ``chosen`` and ``images`` (a list) or ``image``. Prompts are plain text
            with the processor's image placeholders, or conversational.
        model: any model with ``generate``. It stays on its device; its training mode is restored.
        processor: the model's processor: image processor, tokenizer and, for conversations, chat template.
        kinds: ``"question_only"``, ``"image_only"`` or both.
        image_removal: what ``question_only`` sees, in place of ``settings.image_removal``: ``"mask"`` (the default),
            ``"blank"``, ``"noise"``, ``"crop"`` or ``"omit"``, see :class:`BiasSettings`.
        settings: the rest, see there. ``BiasSettings.released()`` is what the released code runs.
        batch_size: prompts generated at once.
        cache_dir: folder for one JSON-lines file per kind. An interrupted run continues from there; a file of
            another dataset, model or setting is refused.

    Returns:
        A new dataset; the rows and the other columns are untouched.

    Raises:
        ValueError: on missing or already present columns, unknown kinds or modes, image placeholders that do
            not match the images, or a ``cache_dir`` of another run.
        TypeError: where dataset, model, processor or an image is of the wrong kind.

    Note:
        Noise and crops depend on the seed and the row alone. Greedy answers do not depend on where a run was
        resumed, nor on the batch size up to rounding (padding moves sums; a near-tie may then fall the other
        way). Sampled answers do depend on the batch size, which the cache then insists on.
        Of a conversation, the text of every user turn is replaced; system and earlier assistant turns stay.

    Example:
        >>> add_biased_negatives(dataset, model, processor)  # doctest: +SKIP
        >>> add_biased_negatives(dataset, model, processor, settings=BiasSettings.released())  # doctest: +SKIP
    """
    _check(dataset, model, processor, kinds, image_removal, batch_size)
    settings = settings or BiasSettings()
    settings = replace(settings, image_removal=image_removal or settings.image_removal)
    run = {
        "dataset": dataset_digest(dataset),
        "model": model_digest(model),
        **asdict(settings),
        "crop_area": list(settings.crop_area),
        "batch_size": batch_size if settings.temperature > 0 else None,
    }
    columns = {}
    with evaluation(model):
        for kind in kinds:
            cache = None if cache_dir is None else Path(cache_dir) / f"{kind}.jsonl"
            generate = Answers(model, processor, kind, settings)
            columns[kind] = answer_all(dataset, generate, batch_size, cache, run)
    chosen = dataset[0]["chosen"] if len(dataset) else ""
    for kind, answers in columns.items():
        dataset = dataset.add_column(kind, [_like(chosen, a) for a in answers])
    return dataset


def _like(chosen: Any, answer: str) -> Any:
    """``answer`` as ``chosen`` is written: a string, or a conversation of one assistant turn."""
    if isinstance(chosen, str):
        return answer
    parts = not isinstance(chosen[0]["content"], str)
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}] if parts else answer}]


def _check(dataset: Any, model: Any, processor: Any, kinds: Sequence[str], image_removal: str | None, batch_size: int):
    try:
        import PIL  # noqa: F401
        import transformers  # noqa: F401
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            "napo_loss.bias needs datasets, pillow and transformers: pip install napo-loss[trl]"
        ) from error
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset (one split), got {type(dataset).__name__}")
    if not hasattr(model, "generate"):
        raise TypeError(f"model must have a generate method, got {type(model).__name__}")
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise TypeError(f"processor must hold a tokenizer and an image processor, got {type(processor).__name__}")
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be one or both of {KINDS}, got {kinds!r}")
    if image_removal is not None and image_removal not in get_args(ImageRemoval):
        raise ValueError(f"image_removal must be one of {get_args(ImageRemoval)}, got {image_removal!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    columns = set(dataset.column_names)
    if missing := {"prompt", "chosen"} - columns:
        raise ValueError(f"dataset lacks the columns {sorted(missing)}, it has {dataset.column_names}")
    if len({"images", "image"} & columns) != 1:
        raise ValueError(f"dataset needs a column 'images' or 'image', it has {dataset.column_names}")
    if taken := columns & set(kinds):
        raise ValueError(f"dataset has the columns {sorted(taken)} already: remove them, or ask for other kinds")
