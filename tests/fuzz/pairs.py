"""Cases of the objective: log-probs, references, lengths and settings, made from a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import napo_loss
from napo_loss import MaskedLogps, Moments, Recipe, SequenceLogps

from .cases import Case
from .layouts import laid_out
from .references import Negative, Settings, paper_named

NAMES = ("rejected", "question_only", "image_only")
ROWS = ("policy_rejected", "reference_rejected", "rejected_length", "pair_mask")
"""Tensors with a row for each negative."""
INF = torch.inf


def shapes(o: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the chosen, and of the rejected."""
    return (o["B"],), ((o["B"],) if o["K"] is None else (o["K"], o["B"]))


def drawn_sums(o: dict[str, Any], g: torch.Generator) -> dict[str, Tensor]:
    """Policy and reference log-probs in float64."""
    scale = {"large": 2000.0, "tiny": 0.01}.get(o["values"], 20.0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return -scale * torch.rand(shape, generator=g, dtype=torch.float64)

    of_chosen, of_rejected = shapes(o)
    x = {"policy_chosen": draw(of_chosen), "policy_rejected": draw(of_rejected)}
    x |= {"reference_chosen": draw(of_chosen), "reference_rejected": draw(of_rejected)}
    spoil(x, o["values"])
    return x if o["reference"] else {name: x[name] for name in x if name.startswith("policy")}


def spoil(x: dict[str, Tensor], kind: str) -> None:
    if kind == "same":
        x["reference_chosen"].copy_(x["policy_chosen"])
        x["reference_rejected"].copy_(x["policy_rejected"])
    elif kind == "cancel":  # margins of both signs, whose mean is nearly nothing
        x["policy_chosen"][1::2] -= 25
        x["policy_chosen"][::2] += 25
    elif kind in ("excluded_chosen", "excluded_both"):
        x["policy_chosen"][0] = -INF
    elif kind == "reference_excluded":
        x["reference_chosen"][0] = -INF
    elif kind == "nan":
        x["policy_chosen"][-1] = torch.nan
    if kind in ("excluded_rejected", "excluded_both"):
        x["policy_rejected"][..., 0] = -INF


def drawn_masks(o: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Which pairs count: of each chosen, of each negative, or both."""
    if o["pair_mask"] is None:
        return {}
    g = torch.Generator().manual_seed(seed + 17)
    share = {"all": 1.0, "some": 0.6, "none": 0.0}[o["pair_mask"]]
    of_chosen, of_rejected = shapes(o)
    masks = {"chosen_mask": torch.rand(of_chosen, generator=g) < share}
    masks["pair_mask"] = torch.rand(of_rejected, generator=g) < share
    return {name: x for name, x in masks.items() if o["mask_of"] in ("both", MASKED[name])}


MASKED = {"chosen_mask": "chosen", "pair_mask": "rejected"}
GARBAGE = {"nan": torch.nan, "inf": INF}


def fill_masked(x: dict[str, Tensor], masks: dict[str, Tensor], kind: str) -> None:
    """A pair that does not count may hold anything."""
    for name, mask in masks.items():
        for of in ("policy", "reference"):
            t = x.get(f"{of}_{MASKED[name]}")
            if t is not None and kind in GARBAGE:
                t[~mask] = GARBAGE[kind]


@dataclass
class Pairs:
    """Arguments of the objective, laid out."""

    case: Case
    tensors: dict[str, Tensor]
    beta: float | Tensor

    @property
    def o(self) -> dict[str, Any]:
        return self.case.options

    @property
    def work(self) -> torch.dtype:
        return torch.float64 if self.tensors["policy_chosen"].dtype == torch.float64 else torch.float32

    @property
    def policy(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in ("policy_chosen", "policy_rejected")}

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``[K, B]`` copies, of which the policy's are leaves."""
        found = {}
        for name, t in self.tensors.items():
            x = t.detach().clone(memory_format=torch.contiguous_format).to(dtype)
            if self.o["K"] is None and name in ROWS:
                x = x[None]
            if self.o["K"] is None and name == "previous":
                x = x[:, None]
            found[name] = x.requires_grad_(name in ("policy_chosen", "policy_rejected"))
        return found


def made(case: Case, policy: dict[str, Tensor] | None = None, lengths: dict[str, Tensor] | None = None) -> Pairs:
    """The arguments of a case; in a chain policy and lengths come from what was called before."""
    o, g = case.options, torch.Generator().manual_seed(case.seed + 3)
    dtype = getattr(torch, o["dtype"])
    sums = drawn_sums(o, g)
    if o.get("lengths") and lengths is None:
        of_chosen, of_rejected = shapes(o)
        lengths = {
            "chosen_length": torch.randint(1, 9, of_chosen, generator=g),
            "rejected_length": torch.randint(1, 9, of_rejected, generator=g),
        }
        if o["lengths"] == "zero" and o["B"]:  # a sequence in which nothing counts has log-prob 0
            lengths["chosen_length"][0] = 0
            for name in ("policy_chosen", "reference_chosen"):
                if name in sums:
                    sums[name][0] = 0
        if o["lengths"] != "int":
            lengths = {name: x.to(dtype) for name, x in lengths.items()}
        lengths = {name: laid_out(x, o[f"{name}_layout"]) for name, x in lengths.items()}
    masks = drawn_masks(o, case.seed) if policy is None else {}
    fill_masked(sums, masks, o["masked_value"])
    tensors = {**(lengths or {}), **masks}
    for name, x in sums.items():
        if policy is not None and name in policy:
            tensors[name] = policy[name]
            continue
        kind = dtype
        if name.startswith("reference") and o["reference_dtype"] != "same" and o["dtype"] != "float64":
            kind = getattr(torch, o["reference_dtype"])
        if policy is not None:  # near what the policy says
            x = policy[name.replace("reference", "policy")].detach().double().nan_to_num(0, 0, 0) + x + 10
        x = laid_out(x.to(kind), o[f"{name}_layout"]).detach()
        tensors[name] = x.requires_grad_(name.startswith("policy") or o["references_trained"])
    if o.get("previous"):
        size = (2, *([] if o["K"] is None else [o["K"]]))
        before = torch.rand(size, generator=g, dtype=torch.float64) * torch.tensor([10.0, 90.0]).view(
            2, *[1] * (len(size) - 1)
        )
        if o["previous"] == "infinite":
            before[0] = INF
        if o.get("q_from") != "each_pair":
            tensors["previous"] = laid_out(before.to(torch.promote_types(dtype, torch.float32)), o["previous_layout"])
    beta: float | Tensor = o["beta"]
    if o["beta_is"] != "float":
        beta = torch.tensor(o["beta"], dtype=torch.float64 if o["beta_is"] == "tensor64" else torch.float32)
    return Pairs(case, tensors, beta)


def settings(o: dict[str, Any]) -> Settings:
    """What the reference goes by, from the documentation alone."""
    K = o["K"] or 1
    common = {"average": o["average"], "sft": o["sft"], "q_from": o["q_from"], "decay": o["decay"]}
    if o["recipe"] == "custom":
        rows = [Negative(**_negative(o, k)) for k in range(K)]
        return Settings(rows, dynamic=o["weights"] == "dynamic", **common)
    if o["recipe"] is None:
        names = named(o) if o["named"] else ()
        if set(names) == set(NAMES):
            rows = [paper_named("released")[name] for name in names]
            return Settings(rows, dynamic=o["weights"] != "fixed", **common)
        known = {} if names == ("rejected",) else paper_named("released")
        rows = [known.get(name, Negative()) for name in names] or [Negative()] * K
        rows = [Negative(n.estimator, n.alpha, n.margin, n.q, 1 / K) for n in rows]
        return Settings(rows, dynamic=o["weights"] == "dynamic", **common)
    rows = paper_named("paper" if o["recipe"] == "paper" else "released")
    if o["recipe"] == "scale_free":
        rows = {name: Negative("moment", weight=1 / 3) for name in NAMES}
    return Settings([rows[name] for name in (named(o) if o["named"] else NAMES)], dynamic=True)


def named(o: dict[str, Any]) -> tuple[str, ...]:
    """Names of the negatives, in another order than the recipe's."""
    names = (*NAMES, "fourth", "fifth")[: o["K"]]
    return names[::-1]


def _negative(o: dict[str, Any], k: int) -> dict[str, Any]:
    mixed = {
        "estimator": ("released", "paper", "moment")[k % 3], "margin": ("mean", "sum")[k % 2],
        "fixed_q": (None, 0.0, 0.4)[k % 3], "weight": (0.3, 0.0, 1.5)[k % 3],
    }  # fmt: skip
    if o["q_from"] == "each_pair":
        mixed["estimator"] = ("released", "paper")[k % 2]
    found = {name: mixed[name] if o[name] == "mixed" else o[name] for name in mixed}
    return {"q": found.pop("fixed_q"), "alpha": o["alpha"], **found}


def recipe(o: dict[str, Any]) -> Recipe | None:
    """The same for the package."""
    if o["recipe"] in ("released", "paper", "scale_free"):
        return {"released": napo_loss.RELEASED, "paper": napo_loss.PAPER, "scale_free": napo_loss.SCALE_FREE}[
            o["recipe"]
        ]
    common = {
        "weights": o["weights"], "average_logps": o["average"], "sft_weight": o["sft"], "q_from": o["q_from"],
        "decay": o["decay"],
    }  # fmt: skip
    if o["recipe"] is None:
        return (
            None
            if common == dict(zip(common, (None, False, 0.0, "rank_means", 0.0), strict=True))
            else Recipe(**common)
        )
    rows = [napo_loss.Negative(**_negative(o, k)) for k in range(o["K"] or 1)]
    if o["K"] is None:
        return Recipe(rows[0], **common)
    order = list(range(o["K"]))
    names = named(o) if o["named"] else [str(k) for k in order]
    if o["named"]:
        order.reverse()  # a recipe's order is not that of the log-probs
    return Recipe({names[k]: rows[k] for k in order}, **common)


def arguments(p: Pairs, x: dict[str, Tensor] | None = None) -> tuple:
    """The four log-probs as the function takes them."""
    x = p.tensors if x is None else x
    masks = {"policy_chosen": x.get("chosen_mask"), "policy_rejected": x.get("pair_mask")}

    def given(name: str, length: str) -> Any:
        found, mask = unmasked(name, length), masks.get(name)
        if mask is None:
            return found
        if isinstance(found, dict):
            return {key: MaskedLogps(row, mask[k]) for k, (key, row) in enumerate(found.items())}
        return MaskedLogps(found, mask)

    def unmasked(name: str, length: str) -> Any:
        if name not in x:
            return None
        if p.o["named"] and "rejected" in name:
            rows = [SequenceLogps(x[name][k], x[length][k]) if length in x else x[name][k] for k in range(p.o["K"])]
            return dict(zip(named(p.o), rows, strict=True))
        return SequenceLogps(x[name], x[length]) if length in x and name.startswith("policy") else x[name]

    return (
        given("policy_chosen", "chosen_length"), given("policy_rejected", "rejected_length"),
        given("reference_chosen", "chosen_length"), given("reference_rejected", "rejected_length"),
    )  # fmt: skip


def previous(p: Pairs) -> Any:
    found = p.tensors.get("previous")
    return Moments(*found) if found is not None and p.o["previous"] == "moments" else found
