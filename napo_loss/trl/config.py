"""Arguments of ``NaPOTrainer``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from trl.trainer.dpo_config import DPOConfig

from napo_loss.objective.checks import Q_FROM
from napo_loss.objective.recipes import METHODS, Recipe, defaults

REFUSED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "padding_free": False,
}
"""Options of ``DPOConfig`` that shape another loss, with the only value under which they change nothing here."""


CITATION = {
    "title": "Debiasing Multimodal Large Language Models via Noise-Aware Preference Optimization",
    "id": "2503.17928",
    "citation": """@inproceedings{napo2025,
    title     = {Debiasing Multimodal Large Language Models via Noise-Aware Preference Optimization},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year      = {2025},
    note      = {arXiv:2503.17928}
}""",
}
"""What the model card cites."""

Q_OVER = ("micro_batch", "batch")


def refuse_other_losses(args: DPOConfig) -> None:
    for name, neutral in REFUSED.items():
        value = getattr(args, name, neutral)  # not every TRL has all of them
        if value != neutral and [value] != neutral:
            raise ValueError(
                f"{name}={value!r} has no effect on the NaPO loss and is refused: leave it at {neutral!r}, or use "
                "TRL's DPOTrainer"
            )


@dataclass
class NaPOConfig(DPOConfig):
    r"""Arguments of :class:`NaPOTrainer`: those of TRL's ``DPOConfig`` and the ones below.

    Of the defaults, β = 0.1, the learning rate of 5e-7 and the settings of the three negatives are what the paper
    prints (their q is what its released code runs); all others are TRL's, where the paper's run has its own:
    docs/reproduce.md. Options that shape another loss (``loss_type``, ``ld_alpha``, …: :data:`REFUSED`) raise an error
    when set: they would change nothing.

    Args:
        method: whose settings negatives have that are not set here: ``"released"``, ``"paper"`` or ``"scale_free"``,
            for :data:`napo_loss.RELEASED`, :data:`napo_loss.PAPER` and :data:`napo_loss.SCALE_FREE`.
        negatives: columns of negatives with their :class:`napo_loss.Negative` settings, as
            ``{"rejected": {"q": 0.0, "weight": 0.04}, "image_only": {"alpha": 0.01, "weight": 0.48}}`` (JSON on a
            command line). Default: ``rejected`` and whichever of ``question_only`` and ``image_only`` the dataset
            has, with the settings of the method for these names; where they are not its three, each with weight 1/K.
        negative_weights: ``"fixed"`` or ``"dynamic"``, see :class:`napo_loss.Recipe`. Default: for the method's three
            negatives its own, dynamic, and fixed for others.
        sft_weight: adds ``−sft_weight·log π(y_w)``.
        average_logps: the loss reads per-token means instead of sums.
        q_from: ``"rank_means"``, ``"all_pairs"`` or ``"each_pair"``, see :func:`napo_loss.margin_moments`.
        q_decay: share of the previous step's moments, from which q is read, that is kept, in [0, 1). As in the released
            code q is read from each micro-batch, so gradient accumulation does not change it, and with small
            micro-batches it is noisy: 0.9 averages over about ten of them. The state is saved with checkpoints.
        q_over: what q and dynamic weights are read from: each ``"micro_batch"``, as the released code runs, or the
            ``"batch"`` of an optimiser step, however it is accumulated. Then every pair of the batch counts once, in q
            and in the loss (the default of ``q_from``, ``"rank_means"``, becomes ``"all_pairs"``), and accumulation
            costs one more forward pass of the policy.
        token_metrics: log what TRL does of each token: entropy, accuracy and mean logits.
        reference_columns: the dataset's own ``ref_<column>_logps``, sums in nats of the chosen and of each negative,
            are the reference's log-probs, as those of :func:`napo_loss.bias.read_released`. No reference is run.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, "negatives"]

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})
    method: str = field(default="released", metadata={"help": "Default settings.", "choices": list(METHODS)})
    negatives: dict[str, Any] | None = field(
        default=None, metadata={"help": "Columns of negatives and their settings, as JSON."}
    )
    negative_weights: str | None = field(
        default=None, metadata={"help": "How negatives are weighted.", "choices": ["fixed", "dynamic"]}
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the negative log-likelihood of the chosen."})
    average_logps: bool = field(default=False, metadata={"help": "Per-token mean log-probs instead of sums."})
    q_from: str = field(default="rank_means", metadata={"help": "The margin behind q.", "choices": list(Q_FROM)})
    q_decay: float = field(default=0.0, metadata={"help": "Share of the previous moments that is kept."})

    q_over: str = field(
        default="micro_batch", metadata={"help": "What q and weights are read from.", "choices": list(Q_OVER)}
    )
    token_metrics: bool = field(default=True, metadata={"help": "Log entropy, accuracy and mean logits of tokens."})
    reference_columns: bool = field(
        default=False, metadata={"help": "The dataset's ref_<column>_logps are the reference's log-probs."}
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_other_losses(self)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}")
        if self.negatives is not None and (not isinstance(self.negatives, dict) or not self.negatives):
            raise ValueError(f"negatives must map column names to settings, got {self.negatives!r}")
        if self.q_over not in Q_OVER:
            raise ValueError(f"q_over must be one of {list(Q_OVER)}, got {self.q_over!r}")
        if self.reference_columns and self.precompute_ref_log_probs:
            raise ValueError(
                "reference_columns=True takes the reference's log-probs from the dataset, "
                "precompute_ref_log_probs=True computes them: set one"
            )
        self.recipe(["rejected"] if self.negatives is None else list(self.negatives))  # checks the other values

    def recipe(self, names: list[str]) -> Recipe:
        """The settings of the loss for these negatives, in this order."""
        if self.negatives is None:
            base = defaults(METHODS[self.method], names, len(names))
        else:
            base = Recipe({name: self.negatives[name] for name in names}, weights="fixed")
        return replace(
            base,
            weights=self.negative_weights or base.weights,  # pyright: ignore[reportArgumentType]  checked by Recipe
            average_logps=self.average_logps,
            sft_weight=self.sft_weight,
            q_from=self.q_from,  # pyright: ignore[reportArgumentType]
            decay=self.q_decay,
        )
