"""One form for all the ways to hand over negatives: ``[K, B]`` tensors and one ``Negative`` per row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from napo_loss.checks import check_like, check_logps
from napo_loss.objective.recipes import PAPER_NEGATIVES, Negative, Recipe
from napo_loss.types import SequenceLogps

Logps = Tensor | SequenceLogps


class Group(NamedTuple):
    """B chosen sequences with K negatives each; lengths and references where they were given."""

    policy_chosen: Tensor  # [B]
    policy_rejected: Tensor  # [K, B]
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor | None  # [B]
    rejected_length: Tensor | None  # [K, B]
    negatives: tuple[Negative, ...]  # K
    stacked: bool  # False: the caller gave one negative, [B]


def pack(
    policy_chosen: Logps,
    policy_rejected: Logps | Mapping[str, Logps],
    reference_chosen: Logps | None,
    reference_rejected: Logps | Mapping[str, Logps] | None,
    recipe: Recipe,
    *,
    may_be_empty: bool = False,
) -> Group:
    """Checks everything a caller of :func:`napo_loss.napo_loss` can get wrong, and stacks the negatives."""
    names = _names(policy_rejected)
    if reference_rejected is not None and _names(reference_rejected) != names:
        raise ValueError(
            "reference_rejected_logps must be given like policy_rejected_logps: expected "
            f"{names or 'a tensor'}, got {_names(reference_rejected) or 'a tensor'}"
        )
    chosen, chosen_length = _split(policy_chosen)
    rejected, rejected_length = _stack("policy_rejected_logps", policy_rejected)
    ref_chosen = None if reference_chosen is None else _split(reference_chosen)[0]
    ref_rejected = None if reference_rejected is None else _stack("reference_rejected_logps", reference_rejected)[0]
    check_logps(chosen, rejected, ref_chosen, ref_rejected, may_be_empty=may_be_empty)

    stacked = rejected.dim() == 2
    negatives = _settings(recipe, names, K=rejected.shape[0] if stacked else 1)
    if recipe.average_logps or any(n.margin == "mean" and n.q is None for n in negatives):
        if chosen_length is None or rejected_length is None:
            raise ValueError(
                "this recipe reads per-token means, so policy_chosen_logps and policy_rejected_logps must be "
                "SequenceLogps(sum, length), which carry the lengths; got bare tensors"
            )
        check_like("the length of policy_chosen_logps", chosen_length, "its sum", chosen, chosen.shape)
        check_like("the length of policy_rejected_logps", rejected_length, "its sum", rejected, rejected.shape)
    else:
        chosen_length = rejected_length = None
    if not stacked:
        rejected, rejected_length = rejected[None], _row(rejected_length)
        ref_rejected = _row(ref_rejected)
    return Group(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, negatives, stacked)


def flat_settings(negatives: tuple[Negative, ...]) -> list[float]:
    """``[4, K]`` flat, as the objective kernel reads them: α, whether q reads means, fixed q or NaN, weight."""
    return [
        *(n.alpha for n in negatives),
        *(float(n.margin == "mean") for n in negatives),
        *(math.nan if n.q is None else n.q for n in negatives),
        *(n.weight for n in negatives),
    ]


def row_per_negative(q: float | Tensor | None, group: Group) -> Tensor | None:
    """``previous_q`` as one value (or one row) per negative."""
    if q is None:
        return None
    K, B = group.policy_rejected.shape
    q = torch.as_tensor(q, dtype=torch.float32, device=group.policy_rejected.device).detach()
    row = q if group.stacked else q[None]
    if row.shape not in ((K,), (K, B)):
        expected = f"[{K}]" if group.stacked else "a scalar"
        raise ValueError(f"previous_q must be the .q of the step before, {expected}, got shape {list(q.shape)}")
    return row


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[None]


def _names(logps: object) -> list[str] | None:
    return list(logps) if isinstance(logps, Mapping) else None


def _split(logps: Logps) -> tuple[Tensor, Tensor | None]:
    return (logps.sum, logps.length) if isinstance(logps, SequenceLogps) else (logps, None)


def _stack(name: str, logps: Logps | Mapping[str, Logps]) -> tuple[Tensor, Tensor | None]:
    if not isinstance(logps, Mapping):
        return _split(logps)
    if not logps:
        raise ValueError(f"{name} is an empty mapping: at least one negative is needed")
    sums, found = zip(*map(_split, logps.values()), strict=True)
    shapes = {key: list(x.shape) for key, x in zip(logps, sums, strict=True)}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"every negative in {name} must have shape [B], got {shapes}")
    lengths = [x for x in found if x is not None]
    return torch.stack(sums), torch.stack(lengths) if len(lengths) == len(sums) else None


def default_negatives(names: list[str] | None, K: int) -> tuple[Negative, ...]:
    """The published settings for the paper's three names; otherwise the published ones by name, weighted equally."""
    if names is None or names == ["rejected"]:
        return (Negative(weight=1 / K),) * K
    if set(names) == set(PAPER_NEGATIVES):
        return tuple(PAPER_NEGATIVES[name] for name in names)
    return tuple(replace(PAPER_NEGATIVES.get(name, Negative()), weight=1 / K) for name in names)


def _settings(recipe: Recipe, names: list[str] | None, K: int) -> tuple[Negative, ...]:
    given = recipe.negatives
    if isinstance(given, Negative):
        return (given,) * K
    if given is None:
        return default_negatives(names, K)
    if names is None:
        if len(given) != K:
            raise ValueError(
                f"recipe.negatives names {list(given)}, so policy_rejected_logps must be [{len(given)}, B], got K = {K}"
            )
        return tuple(given.values())
    if set(given) != set(names):
        raise ValueError(f"recipe.negatives names {list(given)}, but policy_rejected_logps has {names}")
    return tuple(given[name] for name in names)
