"""Which TRL the trainer runs on: the versions it was tried with, and the methods of TRL's that it replaces or calls."""

from __future__ import annotations

import inspect
from typing import Any

TRIED = ("0.29.1", "1.9.0", "1.14.1", "1.15.0", "1.16.0")
"""Versions that the trainer's tests ran on (docs/trainers.md says how)."""

METHODS = {
    "_get_output_dir": ("trial",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_prepare_inputs": ("inputs",),
    "_save_checkpoint": ("model", "trial"),
    "_set_signature_columns_if_needed": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "compute_ref_log_probs": (),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
}
"""Methods of ``DPOTrainer`` and what the trainer hands them, in this order. TRL promises none with an underscore."""

ATTRIBUTES = ("_metrics", "_total_train_tokens", "beta", "ref_model")
"""What the trainer reads of one that is constructed."""


def advice(found: str) -> str:
    return (
        f"found TRL {found}; napo_loss.trl was tried with {', '.join(TRIED)}: install one of these, or call napo_loss "
        "in a trainer of your version as docs/trainers.md shows"
    )


def check_methods(trainer: type, found: str) -> None:
    """Whether they are what the trainer was written for is looked up, not guessed from a number."""
    for name, expected in METHODS.items():
        method = getattr(trainer, name, None)
        given = None if method is None else inspect.signature(method)
        if given is None or not _takes(given, expected):
            here = "is not there" if given is None else f"takes {[*given.parameters][1:]} there"
            wanted = f"DPOTrainer.{name}({', '.join(expected)})"
            raise ImportError(f"NaPOTrainer needs {wanted}, which {here}: {advice(found)}")


def _takes(signature: inspect.Signature, expected: tuple[str, ...]) -> bool:
    """Whether a method can be called with these, in this order; more parameters may follow if they have defaults."""
    if not expected:
        return True  # only that it is there
    kinds = inspect.Parameter
    _, *parameters = signature.parameters.values()  # without self
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        return True
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)]
    rest = named[len(expected) :]
    return tuple(p.name for p in named[: len(expected)]) == expected and all(p.default is not p.empty for p in rest)


def check_attributes(trainer: Any, found: str) -> None:
    for name in ATTRIBUTES:
        if not hasattr(trainer, name):
            raise RuntimeError(f"NaPOTrainer needs DPOTrainer.{name}, which is not there: {advice(found)}")
