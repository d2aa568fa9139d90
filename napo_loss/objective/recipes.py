"""Settings of the objective: how each kind of negative enters it, and how they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal

from napo_loss.objective.checks import check_mean
from napo_loss.objective.estimators import ALPHA, BOUNDS, check_estimator


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
        alpha: slope α of the noise estimate, where its rule has one; larger: q falls sooner.
        margin: which margin the estimate reads: of the ``"sum"`` or of the per-token ``"mean"`` log-probs.
            The loss itself is not touched by this.
        q: a fixed robustness in [0, 1] instead of the estimate; ``q=0.0`` is plain DPO.
        weight: factor of this negative's loss when weights are fixed.
        estimator: the rule by which q is read, ``"released"``, ``"paper"`` (which reads β·ψ) or ``"moment"``, see
            :func:`napo_loss.noise_level`.

    Raises:
        ValueError: on a setting out of its range.
        TypeError: on one that is no number.
    """

    alpha: float = ALPHA
    margin: Literal["sum", "mean"] = "sum"
    q: float | None = None
    weight: float = 1.0
    estimator: Literal["released", "paper", "moment"] = "released"

    def __post_init__(self):
        if self.estimator not in BOUNDS:
            raise ValueError(f"Negative.estimator must be one of {tuple(BOUNDS)}, got {self.estimator!r}")
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


@dataclass(frozen=True)
class Recipe:
    """Everything about the objective that is not a log-prob, β or a process group.

    Attributes:
        negatives: one :class:`Negative` for all, or a mapping from the name of a negative to its settings
            (with stacked ``[K, B]`` log-probs: in the order of the rows); the names must be the same as in the
            log-probs. A dict of its settings may stand for a :class:`Negative`. Default: those of :data:`RELEASED` for
            the names that it has, ``Negative()`` for others, for unnamed rows and a lone ``"rejected"``.
        weights: ``"fixed"``: ``Negative.weight``, and ``1/K`` where negatives are not given; ``"dynamic"``: each
            negative's share of the summed mean margins. Default: dynamic for the three names of :data:`RELEASED`, as
            the paper prints, and fixed for all others.
        average_logps: the loss reads per-token mean log-probs instead of sums, and q the same, as the released code
            runs it.
        sft_weight: adds ``−sft_weight·log π(y_w)`` to each loss, as the released code can.
        q_from: what the margin behind q is, see :func:`napo_loss.margin_moments`.
        decay: share of the previous moments that is kept, see :func:`napo_loss.margin_moments`.

    Raises:
        ValueError: on a setting out of its range.
        TypeError: on one of the wrong kind.

    Example:
        >>> from napo_loss import Recipe
        >>> recipe = Recipe({"rejected": {"q": 0.0}, "image_only": {"alpha": 0.01, "weight": 0.5}}, weights="fixed")
        >>> recipe.negatives["rejected"]
        Negative(alpha=0.01, margin='sum', q=0.0, weight=1.0, estimator='released')
    """

    negatives: Negative | Mapping[str, Negative] | None = field(default=None, hash=False)
    weights: Literal["fixed", "dynamic"] | None = None
    average_logps: bool = False
    sft_weight: float = 0.0
    q_from: Literal["rank_means", "all_pairs", "each_pair"] = "rank_means"
    decay: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "negatives", _negatives(self.negatives))
        if self.weights not in ("fixed", "dynamic", None):
            raise ValueError(f"Recipe.weights must be 'fixed' or 'dynamic', got {self.weights!r}")
        check_mean(self.q_from, self.decay, "Recipe.")
        if not self.sft_weight >= 0:
            raise ValueError(f"Recipe.sft_weight must be >= 0, got {self.sft_weight}")
        if self.q_from == "each_pair" and self.decay > 0:
            raise ValueError(
                f"Recipe.decay = {self.decay} has nothing to smooth with q_from='each_pair': each pair has its own q"
            )
        for negative in [self.negatives] if isinstance(self.negatives, Negative) else self.named.values():
            if negative.q is None:
                check_estimator(negative.estimator, None, self.q_from)

    @property
    def named(self) -> Mapping[str, Negative]:
        """The negatives that have names."""
        return self.negatives if isinstance(self.negatives, Mapping) else {}


def _negatives(given: Any) -> Negative | Named | None:
    """As they are kept: nobody else's dict, every Negative checked."""
    if given is None or isinstance(given, (Negative, Named)):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"Recipe.negatives must be a Negative, a mapping from names to them, or None, got {given!r}")
    if not given:
        raise ValueError("Recipe.negatives is an empty mapping: at least one negative is needed")
    if not any(isinstance(settings, (Negative, Mapping)) for settings in given.values()):
        return Negative.of("Recipe.negatives", given)  # one dict of numbers: one Negative for all
    return Named({name: Negative.of(f"Recipe.negatives[{name!r}]", x) for name, x in given.items()})


def misplaced(function: str, settings: Mapping[str, object]) -> TypeError:
    """The error for settings given to a function whose recipe has them."""
    of_negative = {name: x for name, x in settings.items() if name in {f.name for f in fields(Negative)}}
    of_recipe = {name: x for name, x in settings.items() if name in {f.name for f in fields(Recipe)}}
    if unknown := [name for name in settings if name not in {**of_negative, **of_recipe}]:
        if "pair_mask" in unknown:
            return TypeError(
                f"{function} takes pair_mask with the log-probs: MaskedLogps(policy_chosen_logps, pair_mask)"
            )
        return TypeError(f"{function} got an unexpected keyword argument {unknown[0]!r}")
    written = [f"Negative({_written(of_negative)})"] if of_negative else []
    written += [_written(of_recipe)] if of_recipe else []
    return TypeError(
        f"{function} has no {', '.join(settings)} of its own: give recipe=Recipe({', '.join(written)}) instead"
    )


def _written(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


RELEASED = Recipe(
    {
        "rejected": Negative(q=0.0, weight=0.04),
        "question_only": Negative(alpha=0.5, margin="mean", weight=0.48),
        "image_only": Negative(alpha=0.01, margin="sum", weight=0.48),
    },
    weights="dynamic",
)
"""q as the released code runs it, with the dynamic weights of the paper's main result: the default for these names.

Plain DPO on ``rejected``, noise-aware terms against language bias (``question_only``) and vision bias (``image_only``).
The paper prints and the released code runs these α and margins. In the released code the dynamic rule is commented out;
with ``dataclasses.replace(RELEASED, weights="fixed")`` the weights are one of the triples among its commented-out runs.
"""

PAPER = Recipe(
    {name: replace(negative, estimator="paper") for name, negative in RELEASED.named.items()}, weights="dynamic"
)
"""Eq. 2 and 9 to 14 as the paper prints them: β inside the margin that q is read from, which then starts at 0.5; q and
the dynamic weights in [0.01, 1]; plain DPO on ``rejected``. The weights start at equal shares, by a prior of ours."""

SCALE_FREE = Recipe({name: Negative(estimator="moment", weight=1 / 3) for name in RELEASED.named}, weights="dynamic")
"""Ours: every term is noise-aware, its q read by the moment estimator, which needs no α for a length or a β."""

METHODS = {"released": RELEASED, "paper": PAPER, "scale_free": SCALE_FREE}


def defaults(method: Recipe, names: Sequence[str] | None, K: int) -> Recipe:
    """``method``, one of the three above, for these negatives; ``names`` is None for unnamed rows.

    For its own names it is itself. Other sets have its settings by name, each with weight ``1/K``, and nothing but its
    estimator for names that it lacks, unnamed rows and a lone ``"rejected"``: an only negative is to be noise-aware.
    """
    if names is not None and set(names) == set(method.named):
        return replace(method, negatives={name: method.named[name] for name in names})
    known = {} if names is None or list(names) == ["rejected"] else method.named
    other = Negative(estimator=method.named["image_only"].estimator)
    rows = [str(k) for k in range(K)] if names is None else names
    negatives = {name: replace(known.get(name, other), weight=1 / K) for name in rows}
    return replace(method, negatives=negatives, weights="fixed")
