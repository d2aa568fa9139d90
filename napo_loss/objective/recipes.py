"""Settings of the objective: how each kind of negative enters it, and how they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal

from napo_loss.objective.checks import Q_FROM


class Named(Mapping):
    """A mapping that stays as it was given, whatever becomes of the caller's dict, and that can be pickled."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]):
        self._items = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Negative:
    """How one kind of negative enters the objective.

    Attributes:
        alpha: slope α of the noise estimate ``q = 2·(1 − σ(α·m̄))``; larger: q falls sooner.
        margin: which margin the estimate reads: of the ``"sum"`` or of the per-token ``"mean"`` log-probs.
            The loss itself is not touched by this.
        q: a fixed robustness in [0, 1] instead of the estimate; ``q=0.0`` is plain DPO.
        weight: factor of this negative's loss when weights are fixed.

    Raises:
        ValueError: on a setting out of its range.
        TypeError: on one that is no number.
    """

    alpha: float = 0.01
    margin: Literal["sum", "mean"] = "sum"
    q: float | None = None
    weight: float = 1.0

    def __post_init__(self):
        for name in ("alpha", "q", "weight"):
            value = getattr(self, name)
            if not isinstance(value, Real) and (value is not None or name != "q"):
                raise TypeError(f"Negative.{name} must be a number, got {value!r}")
        if not self.alpha > 0:
            raise ValueError(f"Negative.alpha must be > 0, got {self.alpha}")
        if self.margin not in ("sum", "mean"):
            raise ValueError(f"Negative.margin must be 'sum' or 'mean', got {self.margin!r}")
        if self.q is not None and not 0 <= self.q <= 1:
            raise ValueError(f"Negative.q must be None or in [0, 1], got {self.q}")
        if not self.weight >= 0:
            raise ValueError(f"Negative.weight must be >= 0, got {self.weight}")

    @classmethod
    def of(cls, where: str, settings: Negative | Mapping[str, Any]) -> Negative:
        """The settings themselves, or made of a dict of them; ``where`` names them in an error."""
        if isinstance(settings, Negative):
            return settings
        if not isinstance(settings, Mapping):
            raise TypeError(f"{where} must be a Negative or a dict of its settings, got {settings!r}")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(
                f"{where} = {dict(settings)!r}: unexpected keyword argument {unknown[0]!r}, a Negative has "
                f"{', '.join(known)}"
            )
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} = {dict(settings)!r}: {error}") from None


DEFAULT_NEGATIVES: Mapping[str, Negative] = Named(
    {
        "rejected": Negative(q=0.0, weight=0.04),
        "question_only": Negative(alpha=0.5, margin="mean", weight=0.48),
        "image_only": Negative(alpha=0.01, margin="sum", weight=0.48),
    }
)
"""What the three names of the paper mean by default: plain DPO on ``rejected``, noise-aware terms against language and
vision bias. The paper prints and the released code runs these α and margins; the fixed weights are one of the triples
among the released code's commented-out runs, while the paper's main result weighs dynamically."""


@dataclass(frozen=True)
class Recipe:
    """Everything about the objective that is not a log-prob, β or a process group.

    Attributes:
        negatives: one :class:`Negative` for all, or a mapping from the name of a negative to its settings
            (with stacked ``[K, B]`` log-probs: in the order of the rows); the names must be the same as in the
            log-probs. A dict of its settings may stand for a :class:`Negative`. Default: :data:`DEFAULT_NEGATIVES` for
            its three names; for any other set its settings by name, ``Negative()`` for names it lacks, unnamed rows
            and a lone ``"rejected"``, each with weight ``1/K``.
        weights: ``"fixed"``: ``Negative.weight``; ``"dynamic"``: each negative's share of the summed mean
            reward margins.
        average_logps: the loss reads per-token mean log-probs instead of sums.
        sft_weight: adds ``−sft_weight·log π(y_w)`` to each loss, as the released code can.
        q_from: what the margin behind q is, see :func:`napo_loss.noise_level`.
        decay: share of the previous q that is kept, see :func:`napo_loss.noise_level`.

    Raises:
        ValueError: on a setting out of its range.
        TypeError: on one of the wrong kind.

    Example:
        >>> from napo_loss import Recipe
        >>> recipe = Recipe({"rejected": {"q": 0.0}, "image_only": {"alpha": 0.01, "weight": 0.5}}, weights="fixed")
        >>> recipe.negatives["rejected"]
        Negative(alpha=0.01, margin='sum', q=0.0, weight=1.0)
    """

    negatives: Negative | Mapping[str, Negative] | None = field(default=None, hash=False)
    weights: Literal["fixed", "dynamic"] = "fixed"
    average_logps: bool = False
    sft_weight: float = 0.0
    q_from: Literal["rank_means", "all_pairs", "each_pair"] = "rank_means"
    decay: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "negatives", _negatives(self.negatives))
        if self.weights not in ("fixed", "dynamic"):
            raise ValueError(f"Recipe.weights must be 'fixed' or 'dynamic', got {self.weights!r}")
        if self.q_from not in Q_FROM:
            raise ValueError(f"Recipe.q_from must be one of {Q_FROM}, got {self.q_from!r}")
        if not self.sft_weight >= 0:
            raise ValueError(f"Recipe.sft_weight must be >= 0, got {self.sft_weight}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"Recipe.decay must be in [0, 1), got {self.decay}")

    @property
    def smooths(self) -> bool:
        """Whether q depends on the one before."""
        return self.decay > 0 and self.q_from != "each_pair"


def _negatives(given: Any) -> Negative | Named | None:
    """As they are kept: nobody else's dict, every Negative checked."""
    if given is None or isinstance(given, Negative | Named):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"Recipe.negatives must be a Negative, a mapping from names to them, or None, got {given!r}")
    if not given:
        raise ValueError("Recipe.negatives is an empty mapping: at least one negative is needed")
    if not any(isinstance(settings, Negative | Mapping) for settings in given.values()):
        return Negative.of("Recipe.negatives", given)  # one dict of numbers: one Negative for all
    return Named({name: Negative.of(f"Recipe.negatives[{name!r}]", x) for name, x in given.items()})


def misplaced(function: str, settings: Mapping[str, object]) -> TypeError:
    """The error for settings given to a function whose recipe has them."""
    of_negative = {name: x for name, x in settings.items() if name in {f.name for f in fields(Negative)}}
    of_recipe = {name: x for name, x in settings.items() if name in {f.name for f in fields(Recipe)}}
    if unknown := [name for name in settings if name not in {**of_negative, **of_recipe}]:
        return TypeError(f"{function} got an unexpected keyword argument {unknown[0]!r}")
    written = [f"Negative({_written(of_negative)})"] if of_negative else []
    written += [_written(of_recipe)] if of_recipe else []
    return TypeError(
        f"{function} has no {', '.join(settings)} of its own: give recipe=Recipe({', '.join(written)}) instead"
    )


def _written(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
