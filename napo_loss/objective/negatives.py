"""One form for all the ways to hand over negatives: ``[K, B]`` tensors and one ``Negative`` per row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from napo_loss.backend import by_name, upcast
from napo_loss.checks import check_tensor
from napo_loss.objective.checks import check_length, check_logps, check_pair_mask, checked_previous
from napo_loss.objective.estimators import BatchMoments, Moments
from napo_loss.objective.recipes import RELEASED, Negative, Recipe, defaults
from napo_loss.types import MaskedLogps, SequenceLogps

Logps = Tensor | SequenceLogps | MaskedLogps


class BatchLogps(NamedTuple):
    """Log-probs of B chosen and K negatives of each; references and lengths where they were given."""

    policy_chosen: Tensor  # [B]
    policy_rejected: Tensor  # [K, B]
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor | None  # [B], float
    rejected_length: Tensor | None  # [K, B]
    pair_mask: Tensor | None = None  # [K, B], bool: the pairs that count

    def pairs(self) -> int | Tensor:
        """How many pairs count: B, or ``[K]`` where a mask says."""
        return self.policy_rejected.shape[-1] if self.pair_mask is None else self.pair_mask.sum(-1)

    def counted(self) -> BatchLogps:
        """With zeros, of length 1, for what does not count, which may be NaN; no gradient goes there."""
        if self.pair_mask is None:
            return self
        counts = {1: self.pair_mask.any(0), 2: self.pair_mask}
        others = {"chosen_length": 1.0, "rejected_length": 1.0}
        given = {name: x for name, x in by_name(self, BatchLogps).items() if x is not None and name != "pair_mask"}
        kept = {name: torch.where(counts[x.dim()], x, others.get(name, 0.0)) for name, x in given.items()}
        return BatchLogps(**{**by_name(self, BatchLogps), **kept})


class PreferenceBatch(NamedTuple):
    """B chosen sequences with K negatives each, and how each kind of negative enters the objective."""

    logps: BatchLogps
    negatives: tuple[Negative, ...]  # K
    dynamic: bool  # weights are shares of the mean margins
    average: bool  # the loss, and q with it, reads per-token means
    stacked: bool  # False: the caller gave one negative, [B]

    @classmethod
    def of(
        cls,
        policy_chosen: Logps,
        policy_rejected: Logps | Mapping[str, Logps],
        reference_chosen: Logps | None,
        reference_rejected: Logps | Mapping[str, Logps] | None,
        recipe: Recipe,
        *,
        may_be_empty: bool = False,
    ) -> PreferenceBatch:
        """Checks everything a caller of :func:`napo_loss.napo_loss` can get wrong, and stacks the negatives."""
        names = _names(policy_rejected)
        if reference_rejected is not None and _names(reference_rejected) != names:
            raise ValueError(
                "reference_rejected_logps must be given like policy_rejected_logps: expected "
                f"{names or 'a tensor'}, got {_names(reference_rejected) or 'a tensor'}"
            )
        chosen = _split(policy_chosen)
        rejected = _stack("policy_rejected_logps", policy_rejected)
        ref = _Given() if reference_chosen is None else _split(reference_chosen)
        refs = _Given() if reference_rejected is None else _stack("reference_rejected_logps", reference_rejected)
        check_logps(chosen.sum, rejected.sum, ref.sum, refs.sum, may_be_empty=may_be_empty)

        stacked = rejected.sum.dim() == 2
        settings_of = _settings if torch.compiler.is_compiling() else _settings_once
        K = rejected.sum.shape[0] if stacked else 1
        settings = settings_of(recipe, None if names is None else tuple(names), K)
        chosen_length = rejected_length = None
        if recipe.average_logps or any(n.margin == "mean" and n.q is None for n in settings.negatives):
            chosen_length = _length("policy_chosen_logps", chosen)
            rejected_length = _row(_length("policy_rejected_logps", rejected), stacked)
        logps = BatchLogps(
            chosen.sum, _row(rejected.sum, stacked), ref.sum, None if refs.sum is None else _row(refs.sum, stacked),
            chosen_length, rejected_length,
            _pair_mask(
                policy_chosen_logps=chosen, policy_rejected_logps=rejected, reference_chosen_logps=ref,
                reference_rejected_logps=refs,
            ),
        )  # fmt: skip
        return cls(logps, settings.negatives, settings.dynamic, recipe.average_logps, stacked)

    def reads_mean(self, negative: Negative) -> bool:
        """Whether the moments of this negative are of per-token means: where q is fixed, of what the loss reads."""
        return self.average or (negative.margin == "mean" and negative.q is None)

    def previous(self, moments: Moments | Tensor | None, *, each_pair: bool) -> Tensor | None:
        """The moments of the step before as ``[2, K]``; a row of one where the caller gave one negative."""
        if moments is None:
            return None
        K, B = self.logps.policy_rejected.shape
        expected = torch.Size([2, *([K] if self.stacked else []), *([B] if each_pair else [])])
        previous = checked_previous("previous_moments", moments, expected).to(self.logps.policy_rejected.device)
        return previous if self.stacked else previous[:, None]

    def means(self, name: str, moments: BatchMoments) -> Tensor:
        """The moments of the batch that this one is a part of, as ``[3, K]`` beside the log-probs."""
        if not isinstance(moments, BatchMoments):
            raise TypeError(f"{name} must be what NaPOLoss.batch_moments returned, got {type(moments).__name__}")
        K = self.logps.policy_rejected.shape[0]
        means = torch.stack(moments).detach().to(self.logps.policy_rejected.device)
        expected = [3, K] if self.stacked else [3]
        if list(means.shape) != expected:
            raise ValueError(
                f"{name} are of a batch with other negatives: expected {expected}, got {list(means.shape)}"
            )
        return means if self.stacked else means[:, None]


class _Given(NamedTuple):
    """Log-probs as they came: bare tensors have no length."""

    sum: Any = None  # checked later
    length: Tensor | None = None
    pair_mask: Tensor | None = None


def _row(x: Tensor, stacked: bool) -> Tensor:
    """One negative as the first of one."""
    return x if stacked else x[None]


def _names(logps: object) -> list[str] | None:
    return list(logps) if isinstance(logps, Mapping) else None


def _split(logps: Logps) -> _Given:
    mask = None
    if isinstance(logps, MaskedLogps):
        logps, mask = logps
    return _Given(logps.sum, logps.length, mask) if isinstance(logps, SequenceLogps) else _Given(logps, None, mask)


def _pair_mask(**given: _Given) -> Tensor | None:
    """``[K, B]``: the pairs that every mask counts; None where there is no mask."""
    mask = None
    for name, x in given.items():
        if x.pair_mask is not None:
            check_pair_mask(f"the pair_mask of {name}", x.pair_mask, "its log-probs", x.sum)
            mask = x.pair_mask if mask is None else mask & x.pair_mask
    return None if mask is None else mask.expand(torch.atleast_2d(given["policy_rejected_logps"].sum).shape)


def _length(name: str, given: _Given) -> Tensor:
    """The lengths in float32 at least, where the divisor of a sequence without one is no 0: a count is a length too."""
    if given.length is None:
        raise ValueError(
            "this recipe reads per-token means, so policy_chosen_logps and policy_rejected_logps must be "
            "SequenceLogps(sum, length), which carry the lengths; got bare tensors"
        )
    check_length(f"the length of {name}", given.length, given.sum)
    return upcast(given.length)


def _stack(name: str, logps: Logps | Mapping[str, Logps]) -> _Given:
    if not isinstance(logps, Mapping):
        return _split(logps)
    if not logps:
        raise ValueError(f"{name} is an empty mapping: at least one negative is needed")
    given = [_split(x) for x in logps.values()]
    for key, x in zip(logps, given, strict=True):
        check_tensor(f"{name}[{key!r}]", x.sum)
        if x.length is not None:
            check_length(f"the length of {name}[{key!r}]", x.length, x.sum)
    shapes = {key: list(x.sum.shape) for key, x in zip(logps, given, strict=True)}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"every negative in {name} must have shape [B], got {shapes}")
    lengths = [upcast(x.length) for x in given if x.length is not None]
    return _Given(
        torch.stack([upcast(x.sum) for x in given]), torch.stack(lengths) if len(lengths) == len(given) else None,
        _stack_masks(name, dict(zip(logps, given, strict=True))),
    )  # fmt: skip


def _stack_masks(name: str, given: Mapping[str, _Given]) -> Tensor | None:
    """``[K, B]``; a negative without a mask counts."""
    masks = {key: x.pair_mask for key, x in given.items() if x.pair_mask is not None}
    for key, mask in masks.items():
        check_pair_mask(f"the pair_mask of {name}[{key!r}]", mask, "its log-probs", given[key].sum)
    if not masks:
        return None
    all_count = torch.ones_like(next(iter(masks.values())))
    return torch.stack([masks.get(key, all_count) for key in given])


class _Settings(NamedTuple):
    """A recipe for the negatives that came."""

    negatives: tuple[Negative, ...]  # K
    dynamic: bool


def _settings(recipe: Recipe, names: tuple[str, ...] | None, K: int) -> _Settings:
    given = recipe.negatives
    if given is None:
        default = defaults(RELEASED, names, K)
        negatives = tuple(n for _, n in default.named.items())  # torch.compile before 2.9 makes no tuple of values()
        return _Settings(negatives, (recipe.weights or default.weights) == "dynamic")
    dynamic = recipe.weights == "dynamic"
    if isinstance(given, Negative):
        return _Settings((given,) * K, dynamic)
    if names is None:
        if len(given) != K:
            raise ValueError(
                f"recipe.negatives names {list(given)}, so policy_rejected_logps must be [{len(given)}, B], got K = {K}"
            )
        return _Settings(tuple(given.values()), dynamic)
    if set(given) != set(names):
        raise ValueError(f"recipe.negatives names {list(given)}, but policy_rejected_logps has {list(names)}")
    return _Settings(tuple(given[name] for name in names), dynamic)


_settings_once = lru_cache(maxsize=64)(_settings)  # every step has the same
