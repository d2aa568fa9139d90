"""``NaPOTrainer``: the steps of TRL's ``DPOTrainer`` that NaPO changes.

TRL prepares models, data and collators; how policy and reference are run is in ``passes``.
"""
# transformers types its trainer's model and its batches too loosely to follow:
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig

from napo_loss.objective.module import NaPOLoss
from napo_loss.objective.recipes import Recipe
from napo_loss.trl import batch, metrics
from napo_loss.trl.config import CITATION, NaPOConfig
from napo_loss.trl.data import (
    NegativesCollator,
    first_row,
    first_rows,
    negative_columns,
    reference_column,
    tokenize_negatives,
)
from napo_loss.trl.floors import Floors
from napo_loss.trl.kept import COLLATORS, Kept, check_columns, check_kept
from napo_loss.trl.models import initial, refuse_encoder_decoder
from napo_loss.trl.passes import NOT_OF_THE_MODEL, OneHead
from napo_loss.trl.settings import Settings
from napo_loss.trl.state import load_moments, save_moments
from napo_loss.trl.versions import check_attributes


class NaPOTrainer(OneHead):
    """TRL's ``DPOTrainer`` with the NaPO loss and any number of negatives per prompt.

    The dataset has ``prompt``, ``chosen``, ``rejected`` and, for more negatives, further columns in the format of
    ``rejected`` (see :class:`NaPOConfig`). The chosen and its negatives are one forward pass. A ``data_collator`` of
    your own must give ``[chosen; negative 1; …; negative K]``; TRL's two, with settings of yours, are made to.

    Without ``ref_model`` the reference is loaded again by the model's name, as TRL does; a model that has no name,
    built from a config, is copied. With ``precompute_ref_log_probs``, for images too, its log-probs are computed once
    and kept beside a dataset on disk.

    Logged beside TRL's metrics, for every negative: ``rewards/<name>``, ``rewards/margins/<name>``,
    ``rewards/accuracies/<name>``, ``logps/<name>``, ``napo/q/<name>`` and ``napo/weight/<name>``. TRL's own
    ``rewards/margins``, ``rewards/accuracies`` and ``logits/rejected`` are means over all negatives.

    Args:
        model: a model or its name, as TRL takes it.
        ref_model: the reference, if it is another.
        args: a :class:`NaPOConfig`, or any ``DPOConfig``, beside which the defaults of the former hold.
        recipe: a :class:`napo_loss.Recipe`, or the name of one (``"released"``, ``"paper"``, ``"scale_free"``), for the
            loss settings of ``args``.
        **kwargs: the others of ``DPOTrainer``.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "napo"]
    _name = "NaPO"
    _paper: ClassVar[dict[str, str]] = CITATION
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: torch.nn.Module | str,
        ref_model: torch.nn.Module | str | None = None,
        args: DPOConfig | None = None,
        *,
        recipe: Recipe | str | None = None,
        **kwargs: Any,
    ):
        settings = Settings(NaPOConfig("napo") if args is None else args, recipe)
        args = settings.args
        kept = check_kept(settings, model, ref_model, kwargs)
        refuse_encoder_decoder(model)
        rows = first_rows(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        self.negatives = negative_columns(rows["train_dataset"], settings.columns)
        for name, row in rows.items():
            negative_columns(row, dict.fromkeys(self.negatives))
            if settings.option("reference_columns"):
                check_columns(name, row, ["chosen", *self.negatives])
        self.recipe = settings.recipe(self.negatives)
        self.settings = settings
        self.is_vision = not {"image", "images"}.isdisjoint(rows["train_dataset"])

        reference = initial(model, args, kwargs.get("peft_config"), kept=kept) if ref_model is None else ref_model
        computed, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False  # TRL's pass knows no images
        try:
            super().__init__(model, reference, args, **kwargs)
        finally:
            args.precompute_ref_log_probs = computed
        check_attributes(self, version("trl"))
        refuse_encoder_decoder(self.model)  # which may have been given by its name

        ranks = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        self.napo = NaPOLoss(self.beta, self.recipe, ranks)
        self.floors = Floors()
        if isinstance(self.data_collator, COLLATORS):
            suffix = "" if self.is_vision else "_ids"
            self.data_collator = NegativesCollator(
                self.data_collator, self.negatives, suffix, kept, args.max_length, args.truncation_mode
            )
        self.kept = Kept(self, computed) if kept else None
        if self.kept is not None:
            if computed:
                self.kept.add_to_all()
            if ref_model is None:
                self.ref_model = None  # has done its work

    # Data.

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        extra = [name for name in self.negatives if name != "rejected"]
        columns = list(first_row(f"the {dataset_name} dataset", dataset))
        if extra and "prompt" not in columns:
            raise ValueError(
                f"several negatives need an explicit 'prompt' column; the {dataset_name} dataset has {columns}"
            )
        negative_columns(columns, dict.fromkeys(self.negatives))
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        options = {}
        if isinstance(dataset, Dataset):  # streams know neither
            options = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing negatives of {dataset_name} dataset"}
        with args.main_process_first():  # one rank fills the cache that the others read
            return tokenize_negatives(dataset, extra, processing_class, options)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        suffix = "" if self.is_vision else "_ids"
        extra = [name + suffix for name in self.negatives]
        extra += [reference_column(name) for name in ("chosen", *self.negatives)]
        self._signature_columns += [column for column in extra if column not in self._signature_columns]

    def get_batch_samples(self, *args, **kwargs):
        samples, count = super().get_batch_samples(*args, **kwargs)
        if samples and self.settings.option("q_over") == "batch":
            samples = batch.read(self, samples)
        return samples, count

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if self.kept is not None and eval_dataset is not None and not isinstance(eval_dataset, str):
            if isinstance(eval_dataset, dict):
                named = {f"{metric_key_prefix}_{name}": dataset for name, dataset in eval_dataset.items()}
                found = [self.evaluate(dataset, ignore_keys, name) for name, dataset in named.items()]
                return {key: x for metrics in found for key, x in metrics.items()}
            eval_dataset = self.kept.of(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # A step.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        try:
            loss = self._napo_loss(model, inputs)
        except ValueError as error:
            if self.args.max_length is not None and "image tokens do not match" in str(error):
                raise ValueError(
                    f"`max_length` ({self.args.max_length}) is too short: it cuts off image tokens whose images are "
                    "there. Raise it, or set it to None"
                ) from error
            raise
        if not return_outputs:
            return loss
        with torch.no_grad():
            given = {key: x for key, x in inputs.items() if key not in NOT_OF_THE_MODEL}
            return loss, model(**given, use_cache=False)

    def _napo_loss(self, model, inputs) -> Tensor:
        """The loss of one micro-batch, and what it logs."""
        whole = inputs.get(batch.KEY) or batch.Whole()
        # Before the policy's pass, whose graph may hold weights that another pass would shard.
        reference = self.reference_of(inputs) if whole.reference is None else whole.reference
        token_metrics = self.settings.option("token_metrics")
        router = getattr(self, "aux_loss_enabled", False)
        logps = self.sequence_logps(model, inputs, tokens=token_metrics, router=router)
        chosen, rejected = self.split(logps)
        reference = reference.view(1 + len(self.negatives), -1)
        self.napo.train(self.model.training)  # evaluation neither reads nor moves what training smooths
        out = self.napo(chosen, rejected, reference[0], reference[1:], whole.moments)
        loss = out.losses.mean() if whole.scale is None else whole.scale * out.losses.sum()
        with torch.no_grad():
            found = metrics.of_pairs(out, chosen, rejected, self.negatives)
            if token_metrics:
                found |= metrics.of_tokens(logps, len(out.losses))
            if router:
                found["aux_loss"] = metrics.total(logps.aux_loss)
            self._record(found, metrics.total(inputs["attention_mask"]))
        return loss + self.router_aux_loss_coef * logps.aux_loss if router else loss

    def _record(self, found: dict[str, metrics.Share], attended: metrics.Share) -> None:
        mode = "train" if self.model.training else "eval"
        shares = metrics.over_ranks({**found, "num_tokens": attended}, self.accelerator)
        attended_tokens, _ = shares.pop("num_tokens")
        values = {name: amount / count if count else 0.0 for name, (amount, count) in shares.items()}
        for name, value in values.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(attended_tokens) // getattr(self, "_tp_size", 1)
            if self.recipe.weights == "dynamic":
                self.floors({name: values[f"napo/weight/{name}"] for name in self.negatives})
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    # Checkpoints.

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            save_moments(folder, self.negatives, self.napo.previous_moments)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        smoothed = self.args.q_decay > 0
        moments = load_moments(checkpoint, self.negatives, self.accelerator.device, smoothed=smoothed)
        if moments is not None:
            self.napo.previous_moments = moments
