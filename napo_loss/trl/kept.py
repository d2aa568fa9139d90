"""A reference whose log-probs are kept with the data: computed once, or brought by the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from napo_loss.trl.data import first_row, reference_column
from napo_loss.trl.models import is_fsdp
from napo_loss.trl.reference import ReferencePass
from napo_loss.trl.settings import Settings

COLLATORS = (DataCollatorForPreference, DataCollatorForVisionPreference)


def check_kept(settings: Settings, model: Any, ref_model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether log-probs are kept, if what is asked for goes together."""
    args, collator = settings.args, kwargs.get("data_collator")
    computed, brought = args.precompute_ref_log_probs, settings.option("reference_columns")
    if not computed and not brought:
        return False
    flag = "precompute_ref_log_probs=True" if computed else "reference_columns=True"
    if collator is not None and not isinstance(collator, COLLATORS):
        raise ValueError(f"{flag} needs the trainer's own data_collator or one of TRL's, got {type(collator).__name__}")
    if args.sync_ref_model:
        raise ValueError(f"{flag} is for a reference that stays as it is, which sync_ref_model=True moves: set one")
    if brought and ref_model is not None:
        raise ValueError("reference_columns=True takes log-probs from the dataset, so that ref_model would not be used")
    if computed and is_fsdp(args) and (kwargs.get("peft_config") is not None or is_peft_model(model)):
        raise NotImplementedError(
            "precompute_ref_log_probs=True with PEFT is not supported under FSDP, which shards the model only once "
            "training starts: leave it out, the reference is the same model without its adapter"
        )
    return True


class Kept:
    """Datasets with the reference's log-probs in columns ``ref_<column>_logps``.

    Args:
        trainer: a ``NaPOTrainer`` that is constructed but for this.
        computed: by a pass of this trainer; otherwise the dataset brings them.
    """

    def __init__(self, trainer: Any, computed: bool):
        self.trainer, self.computed = trainer, computed
        self.blocks = ["chosen", *trainer.negatives]
        self.engine: Any = None
        self.done: set[str] = set()

    def add_to_all(self) -> None:
        """To the trainer's own datasets."""
        trainer = self.trainer
        trainer.train_dataset = self._add(trainer.train_dataset, "train", trainer.args.per_device_train_batch_size)
        size, evaluated = trainer.args.per_device_eval_batch_size, trainer.eval_dataset
        if isinstance(evaluated, Mapping):
            trainer.eval_dataset = {name: self._add(dataset, name, size) for name, dataset in evaluated.items()}
        elif evaluated is not None:
            trainer.eval_dataset = self._add(evaluated, "eval", size)

    def of(self, dataset: Any) -> Any:
        """One that is handed to ``evaluate``."""
        trainer = self.trainer
        if not self.computed:
            check_columns("the dataset", first_row("the dataset", dataset), self.blocks)
            return dataset
        if getattr(dataset, "_fingerprint", None) in self.done:
            return dataset
        if trainer.state.global_step > 0 and trainer.ref_model is None and not is_peft_model(trainer.model):
            raise ValueError(
                "the reference's log-probs of this dataset can no longer be computed: with "
                "precompute_ref_log_probs=True and no ref_model, the reference was the policy before its first step. "
                "Give the dataset as eval_dataset, or give a ref_model"
            )
        if not trainer.is_vision:
            dataset = trainer._prepare_dataset(dataset, trainer.processing_class, trainer.args, "eval")
        return self._add(dataset, "eval", trainer.args.per_device_eval_batch_size)

    def _add(self, dataset: Any, name: str, batch_size: int) -> Any:
        trainer = self.trainer
        model = self._model()
        add = ReferencePass(
            self.blocks, trainer.data_collator, model, trainer.ref_model is None,
            lambda inputs: trainer.reference_logps(trainer._prepare_inputs(inputs), model),
            trainer.accelerator, trainer.args.dataloader_num_workers,
        )  # fmt: skip
        dataset = add(dataset, name, trainer.args.precompute_ref_batch_size or batch_size)
        self.done.add(dataset._fingerprint)
        return dataset

    def _model(self) -> Any:
        """The reference; where it is the policy without its adapter, under DeepSpeed, an engine that gathers it."""
        trainer = self.trainer
        if trainer.ref_model is not None:
            return trainer.ref_model
        if trainer.is_deepspeed_enabled and trainer.model_wrapped is trainer.model:  # training has not started
            self.engine = self.engine or prepare_deepspeed(trainer.model, trainer.accelerator)
            return self.engine
        return trainer.model


def check_columns(name: str, row: Any, blocks: list[str]) -> None:
    """That a dataset brings the reference's log-probs."""
    for column in map(reference_column, blocks):
        if not isinstance(row.get(column), int | float):
            found = repr(row[column]) if column in row else f"only {list(row)}"
            raise ValueError(
                f"reference_columns=True needs numbers in the column {column!r} of {name}, the reference's sums of "
                f"log-probs: found {found}"
            )
