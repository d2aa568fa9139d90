"""``NaPOTrainer``: the steps of TRL's ``DPOTrainer`` that NaPO changes.

Written for TRL 1.16. What TRL does well stays TRL's: preparing data, loading the reference model, and the policy's
fused head, which gives token metrics beside the log-probs. The loss and the reference's log-probs are ours.
"""
# transformers types its trainer's model and its batches too loosely to follow:
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference, DPOTrainer

from napo_loss.hf.head import fused_head
from napo_loss.objective.module import NaPOLoss
from napo_loss.trl.config import CITATION, NaPOConfig
from napo_loss.trl.data import NegativesCollator, first_row, negative_columns, reference_column, tokenize_negatives
from napo_loss.trl.floors import Floors
from napo_loss.trl.models import gathered_head, needs_copy
from napo_loss.types import SequenceLogps

STATE_FILE = "napo_state.json"


class NaPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` with the NaPO loss and any number of negatives per prompt.

    The dataset has ``prompt``, ``chosen``, ``rejected`` and, for more negatives, further columns in the format of
    ``rejected`` (see :class:`NaPOConfig`). The chosen and its negatives are one forward pass. A ``data_collator`` of
    your own must give ``[chosen; negative 1; …; negative K]``; TRL's two, with settings of yours, are made to.

    Without ``ref_model`` the reference is loaded again by the model's name, as TRL does; a model that has no name,
    built from a config, is copied.

    Logged beside TRL's metrics, for every negative: ``rewards/<name>``, ``rewards/margins/<name>``,
    ``rewards/accuracies/<name>``, ``logps/<name>``, ``napo/q/<name>`` and ``napo/weight/<name>``. TRL's own
    ``rewards/margins``, ``rewards/accuracies`` and ``logits/rejected`` are means over all negatives.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "dpo", "napo"]
    _name = "NaPO"
    _paper: ClassVar[dict[str, str]] = CITATION

    def __init__(self, model, ref_model=None, args: NaPOConfig | None = None, **kwargs):
        args = args or NaPOConfig("napo")
        if not isinstance(args, NaPOConfig):
            raise TypeError(f"args must be a NaPOConfig, got {type(args).__name__}")
        dataset = kwargs.get("train_dataset")
        if dataset is None:
            raise ValueError("`train_dataset` is required")
        if kwargs.get("data_collator") is not None and args.precompute_ref_log_probs:
            raise ValueError("precompute_ref_log_probs=True needs the trainer's own data_collator, not one of yours")
        self.negatives = negative_columns(first_row("train_dataset", dataset), args.negatives)
        evaluated = kwargs.get("eval_dataset")
        named = evaluated if isinstance(evaluated, dict) else {None: evaluated}
        for split, other in named.items():
            if other is not None:
                name = "eval_dataset" if split is None else f"eval_dataset[{split!r}]"
                negative_columns(first_row(name, other), dict.fromkeys(self.negatives))
        self.recipe = args.recipe(self.negatives)
        copied = ref_model is None and needs_copy(model, args, kwargs.get("peft_config"))
        super().__init__(model, copy.deepcopy(model) if copied else ref_model, args, **kwargs)
        if copied and args.precompute_ref_log_probs:
            self.ref_model = None  # has done its work, as the one that TRL would have loaded
        ranks = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        self.napo = NaPOLoss(self.beta, self.recipe, ranks)
        self.floors = Floors()
        if isinstance(self.data_collator, (DataCollatorForPreference, DataCollatorForVisionPreference)):
            suffix = "" if self._is_vision_dataset else "_ids"
            self.data_collator = NegativesCollator(
                self.data_collator, self.negatives, suffix, self.precompute_ref_logps
            )

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
        return tokenize_negatives(dataset, extra, processing_class, self._tokenizer.eos_token, options)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        suffix = "" if self._is_vision_dataset else "_ids"
        extra = [name + suffix for name in self.negatives]
        extra += [reference_column(name) for name in ("chosen", *self.negatives)]
        self._signature_columns += [column for column in extra if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """TRL's own pass over the data, which knows two columns: run on two blocks at a time, each under its name."""
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # says what it does not support
        if self.accelerator.num_processes > 1 and not dataset.cache_files:
            raise ValueError(
                "precompute_ref_log_probs=True on several ranks hands the log-probs on in a cache file beside the "
                f"dataset, but the {name} dataset is in memory: read it from disk (load_dataset, load_from_disk)"
            )
        blocks = ["chosen", *self.negatives]
        dataset = dataset.remove_columns([c for c in map(reference_column, blocks) if c in dataset.column_names])
        collator = self.data_collator
        self.data_collator = getattr(collator, "collator", collator)
        found: dict[str, Any] = {}
        for first, second in zip(blocks[::2], [*blocks[1::2], "chosen"], strict=False):
            # Renamed columns have a fingerprint of their own, so each pair of blocks has its own cache file.
            pair = dataset.select_columns(["prompt_ids", f"{first}_ids", f"{second}_ids"])
            pair = pair.rename_columns({f"{first}_ids": "chosen_ids", f"{second}_ids": "rejected_ids"})
            done = super()._precompute_ref_logps(pair, f"{name}: {first}, {second}", batch_size)
            found |= {reference_column(first): done["ref_chosen_logps"]}
            found |= {reference_column(second): done["ref_rejected_logps"]}
        self.data_collator = collator
        for column, logps in found.items():
            dataset = dataset.add_column(column, logps)
        return dataset

    def compute_ref_log_probs(self, model, inputs):
        """TRL's contexts (no_grad, adapters, autocast) around our head. It sums tokens: a sequence counts as one."""

        def sequences(fused_lm_head, **kwargs):
            with fused_head(model):
                return SimpleNamespace(log_probs=model(**kwargs).sum[:, None])

        return super().compute_ref_log_probs(sequences, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        """The loss of one micro-batch. ``compute_loss`` stays TRL's: it calls this, and explains a ``max_length`` that
        cuts off image tokens."""
        inputs = {key: x for key, x in inputs.items() if key not in ("ref_chosen_logps", "ref_rejected_logps")}
        reference = inputs.pop("reference_logps", None)
        completion_mask = inputs["completion_mask"]
        model_inputs = {key: x for key, x in inputs.items() if key != "completion_mask"} | {"use_cache": False}
        labels = model_inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        if reference is None:  # before the policy's pass, whose graph may hold weights that another pass would shard
            reference_model = self.model if self.ref_model is None else self.ref_model
            reference = torch.cat(self.compute_ref_log_probs(reference_model, inputs))
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with gathered_head(model):
            outputs = model(**model_inputs, **router, labels=labels, fused_lm_head=True)

        mask = completion_mask[:, 1:]
        K = len(self.negatives)
        # Prompt-learning PEFT prepends virtual tokens to the outputs: the last positions are those of the real ones.
        token_logps = outputs.log_probs[:, -mask.shape[1] :]
        chosen, rejected = SequenceLogps(token_logps.sum(1), mask.sum(1).float()).pairs(K)
        rejected = SequenceLogps(rejected.sum.view(K, -1), rejected.length.view(K, -1))
        reference = reference.view(1 + K, -1)
        self.napo.train(self.model.training)  # evaluation neither reads nor moves what training smooths
        out = self.napo(chosen, rejected, reference[0], reference[1:])
        loss = out.losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._record(out, chosen, rejected, outputs, inputs)
        if return_outputs:
            with torch.no_grad():
                outputs = model(**model_inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, out, chosen, rejected, outputs, inputs):
        """TRL's metrics and ours: sums and counts of this step, added over ranks in one reduction, read in one sync."""
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"][:, 1:]
        B, T = chosen.sum.shape[0], mask.shape[1]
        margins = out.chosen_rewards - out.rejected_rewards

        def tokens(x, rows=slice(None)):
            return (x[:, -T:] * mask)[rows].sum(), mask[rows].sum()

        metrics = {
            "entropy": tokens(outputs.entropy),
            "logits/chosen": tokens(outputs.mean_logits, slice(0, B)),
            "logits/rejected": tokens(outputs.mean_logits, slice(B, None)),
            "mean_token_accuracy": tokens(outputs.is_top1, slice(0, B)),
            "rewards/chosen": total(out.chosen_rewards),
            "rewards/margins": total(margins),
            "rewards/accuracies": total(margins > 0),
            "logps/chosen": total(chosen.sum),
        }
        for k, name in enumerate(self.negatives):
            metrics |= {
                f"rewards/{name}": total(out.rejected_rewards[k]),
                f"rewards/margins/{name}": total(margins[k]),
                f"rewards/accuracies/{name}": total(margins[k] > 0),
                f"logps/{name}": total(rejected.sum[k]),
                f"napo/q/{name}": total(out.q[k]),
                f"napo/weight/{name}": total(out.weights[k]),
            }
        if self.aux_loss_enabled:
            metrics["aux_loss"] = total(outputs.aux_loss)
        metrics["num_tokens"] = total(inputs["attention_mask"])
        packed = torch.stack(
            [torch.stack([torch.as_tensor(x, device=mask.device).float() for x in pair]) for pair in metrics.values()]
        )
        rows = self.accelerator.reduce(packed, "sum").tolist()
        for name, (amount, count) in zip(metrics, rows, strict=True):
            self._metrics[mode][name].append(amount / count if count else 0.0)
        if mode == "train":
            self._total_train_tokens += int(rows[-1][0]) // self._tp_size
            if self.recipe.weights == "dynamic":
                self.floors({name: self._metrics[mode][f"napo/weight/{name}"][-1] for name in self.negatives})
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        moments = self.napo.previous_moments
        if moments is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            named = dict(zip(self.negatives, moments.t().tolist(), strict=True))
            (folder / STATE_FILE).write_text(json.dumps({"moments": named}))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (path := Path(checkpoint, STATE_FILE)).exists():
            return
        named = json.loads(path.read_text())["moments"]
        if set(named) != set(self.negatives):
            raise ValueError(f"{path} holds moments for {list(named)}, but the negatives are {self.negatives}")
        columns = torch.tensor([named[name] for name in self.negatives], device=self.accelerator.device)
        self.napo.previous_moments = columns.t().contiguous()


def total(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and count, both on the device of ``x``: a count copied there from the host would wait for the device."""
    amount = x.detach().float().sum()
    return amount, torch.full_like(amount, x.numel())
