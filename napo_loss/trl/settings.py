"""What the trainer's arguments say about the loss, whoever's class of arguments they are."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from napo_loss.objective.recipes import METHODS, RELEASED, Negative, Recipe, defaults
from napo_loss.trl.config import NaPOConfig, refuse_other_losses

OF_RECIPE = ("method", "negatives", "negative_weights", "sft_weight", "average_logps", "q_from", "q_decay")
"""Fields of ``NaPOConfig`` that a recipe has too."""


@dataclass(frozen=True)
class Settings:
    """A ``DPOConfig``, which may be a ``NaPOConfig``, and a recipe beside it.

    Args:
        args: without a recipe, and where it is no ``NaPOConfig``, the defaults of that one hold.
        given: a recipe, or the name of one.
    """

    args: DPOConfig
    given: Recipe | str | None = None

    def __post_init__(self):
        if not isinstance(self.args, DPOConfig):
            raise TypeError(f"args must be a NaPOConfig or another DPOConfig, got {type(self.args).__name__}")
        refuse_other_losses(self.args)
        if isinstance(self.given, str) and self.given not in METHODS:
            raise ValueError(f"recipe must be a Recipe or one of {list(METHODS)}, got {self.given!r}")
        if not isinstance(self.given, Recipe | str | None):
            raise TypeError(f"recipe must be a Recipe or one of {list(METHODS)}, got {self.given!r}")

    def option(self, name: str) -> Any:
        """An option of ``NaPOConfig`` that is no part of the loss; beside any other ``DPOConfig`` its default."""
        return getattr(self.args, name, getattr(NaPOConfig, name))

    @property
    def columns(self) -> list[str] | None:
        """The negatives, where the settings name them: otherwise the dataset does."""
        if isinstance(self.given, Recipe) and self.given.named:
            return list(self.given.named)
        negatives = getattr(self.args, "negatives", None) if isinstance(self.args, NaPOConfig) else None
        return None if negatives is None or self.given is not None else list(negatives)

    def recipe(self, names: list[str]) -> Recipe:
        """The settings of the loss for these negatives, in this order."""
        if self.given is None and isinstance(self.args, NaPOConfig):
            recipe = self.args.recipe(names)
        elif self.given is None:
            recipe = defaults(RELEASED, names, len(names))
        else:
            recipe = _for_names(self.given, names)
            self._check_agreement(recipe)
        if self.option("q_over") == "batch" and recipe.q_from == "rank_means":
            recipe = replace(recipe, q_from="all_pairs")
        return recipe

    def _check_agreement(self, recipe: Recipe) -> None:
        if not isinstance(self.args, NaPOConfig):
            return
        other = {f.name: getattr(self.args, f.name) for f in fields(NaPOConfig) if f.name in OF_RECIPE}
        changed = {name: x for name, x in other.items() if x != getattr(NaPOConfig, name)}
        if not changed:
            return
        names = list(recipe.named)
        written = ", ".join(f"{name}={x!r}" for name, x in changed.items())
        wanted = [n for n in names if self.args.negatives is not None and n not in self.args.negatives]
        if wanted or self.args.recipe(names) != recipe:
            raise ValueError(
                f"recipe={self.given!r} and NaPOConfig({written}) say different things about the loss: give the recipe "
                "or these settings"
            )


def _for_names(given: Recipe | str, names: list[str]) -> Recipe:
    """A recipe that names its negatives."""
    if isinstance(given, str):
        return defaults(METHODS[given], names, len(names))
    if isinstance(given.negatives, Negative):
        return replace(given, negatives=dict.fromkeys(names, given.negatives))
    if given.negatives is None:
        base = defaults(RELEASED, names, len(names))
        return replace(given, negatives=base.negatives, weights=given.weights or base.weights)
    return given
