"""The loss as a module, for trainers that are told a class, and where somebody has to remember the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from napo_loss.checks import check_group
from napo_loss.objective.checks import checked_beta
from napo_loss.objective.loss import napo_loss
from napo_loss.objective.negatives import Logps
from napo_loss.objective.recipes import Recipe, misplaced
from napo_loss.trees import SharesGroup
from napo_loss.types import NaPOOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NaPOLoss(SharesGroup, nn.Module):
    """:func:`napo_loss.napo_loss` as a module, which keeps the moments of the step before where its recipe smooths.

    Args:
        beta: strength β > 0, a number or a 0-d tensor.
        recipe: the other settings, a :class:`napo_loss.Recipe`.
        process_group: ranks over which mean margins are averaged; ``None``: this process alone.
        reduction: what becomes of the losses. ``"none"``: ``[B]``; ``"mean"``: a scalar, 0 where a rank has no pair.

    Shape:
        Called with the four log-probs that :func:`napo_loss.napo_loss` takes, in its order; returns
        :class:`napo_loss.NaPOOutput`.

    Attributes:
        previous_moments: the ``.moments`` of the last call in training mode where ``recipe.decay > 0``, else None.
            They are in the ``state_dict``; in evaluation they are neither read nor moved.

    Raises:
        ValueError: on β ≤ 0, another reduction or a process group that this process is not in.
        TypeError: where a setting is of the wrong kind, or belongs in the recipe.

    Example:
        >>> import torch
        >>> from napo_loss import NaPOLoss, Recipe
        >>> loss_fn = NaPOLoss(beta=0.1, recipe=Recipe(decay=0.9), reduction="mean")
        >>> chosen, rejected = torch.tensor([-10.0, -12.0]), torch.tensor([-60.0, -11.0])
        >>> loss, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, chosen, rejected)
        >>> loss, loss_fn.state_dict()
        (tensor(0.5000), OrderedDict([('previous_moments', tensor([0., 0.]))]))
    """

    previous_moments: Tensor | None

    def __init__(
        self,
        beta: float | Tensor = 0.1,
        recipe: Recipe | None = None,
        process_group: ProcessGroup | None = None,
        reduction: Literal["none", "mean"] = "none",
        **misplaced_settings: object,
    ):
        super().__init__()
        if misplaced_settings:
            raise misplaced("NaPOLoss", misplaced_settings)
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe or None, got {recipe!r}")
        if reduction not in ("none", "mean"):
            raise ValueError(f"reduction must be 'none' or 'mean', got {reduction!r}")
        check_group("process_group", process_group)
        self.beta = checked_beta(beta)
        self.recipe = recipe or Recipe()
        self.process_group = process_group
        self.reduction = reduction
        self.register_buffer("previous_moments", None)  # not in the state_dict while there is none

    def forward(
        self,
        policy_chosen_logps: Logps,
        policy_rejected_logps: Logps | Mapping[str, Logps],
        reference_chosen_logps: Logps | None,
        reference_rejected_logps: Logps | Mapping[str, Logps] | None,
    ) -> NaPOOutput:
        smooths = self.training and self.recipe.decay > 0
        out = napo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            beta=self.beta, recipe=self.recipe, previous_moments=self.previous_moments if smooths else None,
            process_group=self.process_group,
        )  # fmt: skip
        if smooths:
            self.previous_moments = out.moments
        if self.reduction == "mean":
            out = out._replace(losses=out.losses.sum() / max(out.losses.numel(), 1))
        return out

    def extra_repr(self) -> str:
        return f"beta={self.beta}, recipe={self.recipe}, reduction={self.reduction!r}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """A buffer takes the shape of what is loaded: how many negatives there are shows at the first call."""
        found = state_dict.get(f"{prefix}previous_moments")
        self.previous_moments = None if found is None else torch.empty_like(found)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self):
        if self.process_group is not None:  # left out, q would quietly be each process's own
            raise TypeError("a NaPOLoss with a process_group cannot be pickled: save its state_dict instead")
        return self.__dict__
