"""Calls ``NaPOLoss``, step after step, and says what should come out and be remembered."""

from __future__ import annotations

from itertools import pairwise

import torch

from napo_loss import NaPOLoss
from ranks import objective_is

from . import pairs, references
from .cases import Case
from .compare import FEW, Expected, Untouched, exactly
from .objective import Numbers, compare, expected_napo, results
from .pairs import Pairs
from .positions import gradients, upstream


def run(case: Case) -> None:
    """Steps of training, of one batch or its pieces, then perhaps of evaluation; what is remembered is checked too."""
    o, s = case.options, pairs.settings(case.options)
    module = NaPOLoss(pairs.made(case).beta, pairs.recipe(o), reduction=o["reduction"])
    before = None
    smooths = s.decay > 0
    for step in range(o["steps"]):
        p = pairs.made(Case(case.seed + 1000 * step, case.function, o))
        untouched = Untouched(p.tensors)
        if before is not None and smooths:
            p.tensors["previous"] = before if o["K"] is not None else before[:, 0]
        last = step == o["steps"] - 1
        module.train(not (last and o["evaluates"]))
        if not module.training:
            p.tensors.pop("previous", None)
        kept = module.previous_moments
        right, found = taken(module, p, s, step)
        compare(found, right, p.policy)
        untouched.check(found.items())
        if smooths and module.training:
            before = module.previous_moments
            before = (before if o["K"] is not None else before[:, None]).double()
            twin = NaPOLoss(0.1, pairs.recipe(o))
            twin.load_state_dict(module.state_dict())
            exactly(
                "previous_moments of a copy", twin.previous_moments.nan_to_num(7), module.previous_moments.nan_to_num(7)
            )
        else:
            exactly("previous_moments, which are not moved", module.previous_moments is kept, True)


def taken(module: NaPOLoss, p: Pairs, s: references.Settings, step: int) -> tuple[dict[str, Expected], Numbers]:
    o, B = p.o, p.o["B"]
    mean = o["reduction"] == "mean"
    u = upstream(o["upstream"], () if mean else (B,), p.case.seed)
    count = counted(p, slice(None))
    right = expected_napo([p], s, (u / count).expand(B) if mean else u)
    pieces = min(o["pieces"] or 1, B)
    edges = [round(i * B / pieces) for i in range(pieces + 1)]
    tensors, outs = {name: t for name, t in p.tensors.items() if name != "previous"}, []
    with objective_is(fused=o["fused"]):
        moments = module.batch_moments(*pairs.arguments(p, tensors)) if o["pieces"] else None
        for a, b in pairwise(edges):
            part = {name: t[..., a:b] for name, t in tensors.items()}
            outs.append(module(*pairs.arguments(p, part), *([moments] if o["pieces"] else [])))
    found = results(outs[0], o["K"])
    for out in outs[1:]:
        exactly("q of pieces", out.q.nan_to_num(7), outs[0].q.nan_to_num(7))
        exactly("weights of pieces", out.weights.nan_to_num(7), outs[0].weights.nan_to_num(7))
    for name in ("chosen_rewards", "rejected_rewards"):
        found[name] = torch.cat([results(out, o["K"])[name] for out in outs], -1)
    if mean:
        shares = [counted(p, slice(a, b)) / count for a, b in pairwise(edges)]
        parts = [out.losses * share for out, share in zip(outs, shares, strict=True)]
        total = sum(parts, torch.tensor(0.0))
        e = right["losses"]
        right["losses"] = Expected(
            e.exact.sum() / count, e.plain.sum() / count, torch.as_tensor(e.spread).abs().sum() / count * (1 + FEW),
            e.work, e.dtype,
        )  # fmt: skip
        found["losses"] = total.to(outs[0].losses.dtype)
        exactly("dtype of the mean", outs[0].losses.dtype, p.work)
    else:
        found["losses"] = torch.cat([out.losses for out in outs])
        total = found["losses"]
    grads = gradients((total * u.to(total.dtype)).sum(), p.policy)
    return right, found | {f"gradient of {name}": t for name, t in grads.items()}


def counted(p: Pairs, part: slice) -> int:
    """How many chosen of this part count; at least 1, as a divisor."""
    mask = references.mask_of(p.tensors)
    if mask is None:
        return len(p.tensors["policy_chosen"][part])
    return max(1, int(torch.atleast_2d(mask).any(0)[part].sum()))
