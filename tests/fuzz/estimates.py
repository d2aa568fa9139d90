"""Calls ``margin_moments``, ``noise_level`` and ``likely_swapped``, and says what should come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import napo_loss
from napo_loss import Moments

from .cases import Case
from .compare import Expected, Untouched, check, exactly
from .layouts import laid_out
from .objective import modes
from .pairs import GARBAGE, drawn_masks
from .positions import compiled
from .references import BOUNDS, moments_of, q_of, smoothed

INF = torch.inf


def margin_of(o: dict[str, Any], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 7)
    shape = (o["B"],) if o["K"] is None else (o["K"], o["B"])
    x = torch.randn(shape, generator=g, dtype=torch.float64) * {"large": 3000.0, "tiny": 0.01}.get(o["values"], 20.0)
    if o["values"] == "same":
        x.zero_()
    elif o["values"] == "ties":
        x = (x / 20).round()
    elif o["values"] == "cancel":
        x = x.abs()
        x[..., ::2] *= -1
    elif o["values"] in ("excluded_chosen", "excluded_rejected", "nan") and x.numel():
        x[..., 0] = {"excluded_chosen": -INF, "excluded_rejected": INF, "nan": torch.nan}[o["values"]]
    x = x.to(getattr(torch, o["dtype"]))
    mask = mask_of(o, seed)
    if mask is not None and o["masked_value"] in GARBAGE:
        x[~mask.expand(x.shape)] = GARBAGE[o["masked_value"]]
    return laid_out(x, o["margin_layout"]).detach().requires_grad_(o["trained"])


def mask_of(o: dict[str, Any], seed: int) -> Tensor | None:
    """Which margins count: ``[B]``, or of their shape."""
    return next(iter(drawn_masks(o, seed).values()), None) if "pair_mask" in o else None


def working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def expected(
    formula: Callable[..., dict[str, Tensor]], given: list[Tensor | None], work: torch.dtype
) -> dict[str, Expected]:
    """Results of a function of these tensors, with the shift of each as its spread."""

    def at(dtype: torch.dtype) -> list[Tensor | None]:
        return [None if x is None else x.detach().clone().to(dtype) for x in given]

    exact, plain, eps = formula(*at(torch.float64)), formula(*at(work)), torch.finfo(work).eps
    spread = {name: t.abs().clamp_min(1 if name == "q" else 0) for name, t in exact.items()}
    for i, x in enumerate(given):
        if x is None or x.numel() == 0:
            continue
        nudged = at(torch.float64)
        nudged[i] = x.detach().double() * (1 + eps)
        for name, t in formula(*nudged).items():
            spread[name] = spread[name] + ((t - exact[name]) / eps).abs().nan_to_num(0, 0, 0)
    return {name: Expected(exact[name], plain[name], spread[name], work, work) for name in exact}


def previous_of(o: dict[str, Any], margin: Tensor, seed: int) -> Tensor | None:
    if o["previous"] is None:
        return None
    shape = margin.shape if o["q_from"] == "each_pair" else margin.shape[:-1]
    g = torch.Generator().manual_seed(seed + 9)
    x = 50 * torch.rand((2, *shape), generator=g, dtype=torch.float64)
    if o["previous"] == "infinite":
        x[0] = INF
    return laid_out(x.to(working(margin)), o["previous_layout"])


Masks = list[Tensor | None]


def raw(margins: tuple[Tensor, ...], o: dict[str, Any], rank: int, masks: Masks) -> tuple[Tensor, Tensor]:
    """Moments of the margins that count, of all ranks or, of each pair, of one."""
    parts = slice(rank, rank + 1) if o["q_from"] == "each_pair" else slice(None)
    given = [m for m in masks[parts] if m is not None]
    return moments_of(list(margins[parts]), o["q_from"], given or None)


def formula_of_moments(o: dict[str, Any], masks: Masks, rank: int = 0) -> Callable[..., dict[str, Tensor]]:
    def formula(before: Tensor | None, *margins: Tensor) -> dict[str, Tensor]:
        found = raw(margins, o, rank, masks)
        found = smoothed(torch.stack(found), before, o["decay"])
        return {"mean": found[0], "square": found[1]}

    return formula


def formula_of_q(o: dict[str, Any], masks: Masks, rank: int = 0) -> Callable[..., dict[str, Tensor]]:
    def formula(*margins: Tensor) -> dict[str, Tensor]:
        found = raw(margins, o, rank, masks)
        alpha = 0.01 if o["alpha"] is None else o["alpha"]
        return {"q": q_of(*found, o["estimator"], alpha, o["bounds"] or BOUNDS[o["estimator"]])}

    return formula


def run_moments(case: Case) -> None:
    o = case.options
    margin, mask = margin_of(o, case.seed), mask_of(o, case.seed)
    before = previous_of(o, margin, case.seed)
    tensors = {"margin": margin} | ({} if before is None else {"previous": before})
    untouched = Untouched(tensors)

    def call(x: dict[str, Tensor]) -> Moments:
        given: Any = x.get("previous")
        if given is not None and o["previous"] == "moments":
            given = Moments(*given)
        return napo_loss.margin_moments(
            x["margin"], q_from=o["q_from"], previous=given, decay=o["decay"], pair_mask=mask
        )

    with modes(o):
        found = (compiled(call) if o["call"] == "compile" else call)(tensors)
    finish(found._asdict(), expected(formula_of_moments(o, [mask]), [before, margin], working(margin)), untouched)


def run_noise(case: Case) -> None:
    o = case.options
    margin, mask = margin_of(o, case.seed), mask_of(o, case.seed)
    untouched = Untouched({"margin": margin})

    def call(x: Tensor) -> Tensor:
        settings = {"estimator": o["estimator"], "alpha": o["alpha"], "bounds": o["bounds"], "q_from": o["q_from"]}
        if o["from_moments"]:
            return napo_loss.noise_level(napo_loss.margin_moments(x, pair_mask=mask), **settings)
        return napo_loss.noise_level(x, **settings, pair_mask=mask)

    with modes(o):
        found = {"q": (compiled(call) if o["call"] == "compile" else call)(margin)}
    finish(found, expected(formula_of_q(o, [mask]), [margin], working(margin)), untouched)


def finish(found: dict[str, Tensor], right: dict[str, Expected], untouched: Untouched) -> None:
    for name, t in found.items():
        check(name, t, right[name])
        exactly(f"requires_grad of {name}", t.requires_grad, False)
    untouched.check(found.items())


def run_swapped(case: Case) -> None:
    """The smallest margins, in order; which of equal ones is not said."""
    o = case.options
    margin = margin_of(o, case.seed)
    untouched = Untouched({"margin": margin})
    count = {"one": 1, "half": max(1, o["B"] // 2), "all": o["B"]}[o["count"]]
    with modes(o):
        found = napo_loss.likely_swapped(margin, count)
    exactly("dtype", found.dtype, torch.int64)
    exactly("shape", tuple(found.shape), (*margin.shape[:-1], count))
    untouched.check([("indices", found)])
    for row, indices in zip(margin.detach().reshape(-1, o["B"]), found.reshape(-1, count), strict=True):
        exactly("distinct indices", len(set(indices.tolist())), count)
        order = sorted(row.double().tolist(), key=lambda v: (v != v, v))[:count]  # NaN last
        ours = torch.tensor(row.double()[indices].tolist()).nan_to_num(-7, 8, 9)
        exactly("margins", ours.tolist(), torch.tensor(order).nan_to_num(-7, 8, 9).tolist())
