"""The loss as a module, for trainers that are told a class, and where somebody has to remember the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from napo_loss.checks import check_group
from napo_loss.objective.checks import checked_beta
from napo_loss.objective.estimators import BatchMoments
from napo_loss.objective.loss import batch_means, loss_of
from napo_loss.objective.negatives import Logps, PreferenceBatch
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
        reduction: what becomes of the losses. ``"none"``: ``[B]``; ``"mean"``: a scalar, over those with a
            pair that is not masked; 0 where a rank has none.

    Shape:
        Called with the four log-probs that :func:`napo_loss.napo_loss` takes, in its order, masked ones too
        (:class:`napo_loss.MaskedLogps`), and ``moments``, where the batch is one of several micro-batches and q and
        weights are to be those of all (:meth:`batch_moments`); returns :class:`napo_loss.NaPOOutput`.

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
        moments: BatchMoments | None = None,
    ) -> NaPOOutput:
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        beta, group = checked_beta(self.beta), self.process_group
        batch = PreferenceBatch.of(*logps, self.recipe, may_be_empty=moments is not None or group is not None)
        if moments is not None:
            out = loss_of(batch, beta, self.recipe, None, None, batch.means("moments", moments))
        else:
            previous = batch.previous(self._previous(), each_pair=self.recipe.q_from == "each_pair")
            out = loss_of(batch, beta, self.recipe, previous, group)
            self._keep(out.moments)
        if self.reduction == "mean":
            mask = batch.logps.pair_mask
            count = max(out.losses.numel(), 1) if mask is None else mask.any(0).sum().clamp_min(1)
            out = out._replace(losses=out.losses.sum() / count)
        return out

    def batch_moments(
        self,
        policy_chosen_logps: Logps,
        policy_rejected_logps: Logps | Mapping[str, Logps],
        reference_chosen_logps: Logps | None,
        reference_rejected_logps: Logps | Mapping[str, Logps] | None,
    ) -> BatchMoments:
        """What q and weights of a whole batch are read from; handed over as ``moments``, every micro-batch has these.

        Takes what the module is called with, of all micro-batches together (detached), reduces over the process group
        and, in training, smooths once. A call with ``moments`` does neither.

        Example:
            >>> import torch
            >>> from napo_loss import NaPOLoss
            >>> loss_fn, zero = NaPOLoss(), torch.zeros(4)
            >>> logps = torch.tensor([-10.0, -12, -9, -14]), torch.tensor([-60.0, -11, -99, -14]), zero, zero
            >>> moments = loss_fn.batch_moments(*logps)
            >>> whole, half = loss_fn(*logps), loss_fn(*(x[:2] for x in logps), moments)
            >>> whole.q, half.q
            (tensor(0.8280), tensor(0.8280))
        """
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        batch = PreferenceBatch.of(*logps, self.recipe, may_be_empty=self.process_group is not None)
        previous = batch.previous(self._previous(), each_pair=False)
        found = BatchMoments(*batch_means(batch, self.recipe, previous, self.process_group))
        found = found if batch.stacked else BatchMoments(*(x[0] for x in found))
        self._keep(torch.stack(found[:2]))
        return found

    @property
    def _smooths(self) -> bool:
        return self.training and self.recipe.decay > 0

    def _previous(self) -> Tensor | None:
        """The moments of the step before, where this one is to be smoothed with them."""
        return self.previous_moments if self._smooths else None

    def _keep(self, moments: Tensor) -> None:
        if self._smooths:
            self.previous_moments = moments

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
