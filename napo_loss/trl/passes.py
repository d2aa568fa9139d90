"""Passes of policy and reference through one head, ours, in the same contexts: equal weights give equal bits."""
# transformers types its trainer's model and its batches too loosely to follow:
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from napo_loss.hf.head import fused_head
from napo_loss.trl import batch
from napo_loss.trl.models import as_reference
from napo_loss.types import SequenceLogps

NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "reference_logps", batch.KEY)


class OneHead(DPOTrainer):
    """TRL's ``DPOTrainer`` with sequence log-probs from ``fused_head``, of the policy and of the reference alike."""

    negatives: list[str]

    def sequence_logps(self, model, inputs, *, tokens: bool = False, router: bool = False) -> SequenceLogps:
        """Log-probs ``[N]`` of a batch: of the policy and of the reference alike, in the same contexts."""
        given = {key: x for key, x in inputs.items() if key not in NOT_OF_THE_MODEL}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router_logits = {"output_router_logits": True} if router else {}
        with self.accelerator.autocast(), fused_head(model, token_statistics=tokens):
            return model(**given, **router_logits, labels=labels)

    @torch.no_grad()
    def reference_logps(self, inputs, model=None) -> Tensor:
        """Log-probs ``[N]`` of the reference; ``model``: another that stands for it."""
        if self.ref_model is not None:
            return self.sequence_logps(model or self.ref_model, inputs).sum
        model = model or self.model
        with as_reference(self.accelerator.unwrap_model(model)):
            return self.sequence_logps(model, inputs).sum

    def reference_of(self, inputs) -> Tensor:
        """Log-probs ``[N]`` that a batch holds, or else those of the reference."""
        held = inputs.get("reference_logps")
        if held is None:
            return self.reference_logps(inputs)
        return held.flatten() if isinstance(held, Tensor) else held.logps

    def compute_ref_log_probs(self, *args):
        """What TRL's own method returns, of the chosen and of all negatives; the last argument is the batch."""
        logps = self.reference_logps(args[-1])
        B = len(logps) // (1 + len(self.negatives))
        return logps[:B], logps[B:]

    def split(self, logps: SequenceLogps) -> tuple[SequenceLogps, SequenceLogps]:
        """The chosen ``[B]`` and the negatives ``[K, B]``."""
        K = len(self.negatives)
        chosen, rejected = logps.pairs(K)
        return chosen, SequenceLogps(rejected.sum.view(K, -1), rejected.length.view(K, -1))
