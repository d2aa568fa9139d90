"""Cases of several ranks: each makes all arguments from the seed, takes its part, and compares what it gets."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import napo_loss
from napo_loss import SequenceLogps

from . import estimates, logps, objective, pairs
from .cases import Case
from .compare import Expected, Untouched, check, exactly
from .layouts import laid_out
from .positions import Positions, made, upstream

AXES = {"logits": -1, "weight": 0, "bias": 0, "lora_B": 0}
"""The dimension of the vocabulary."""


def run(group: Any, case: Case) -> None:
    """On one of the ranks of the group."""
    torch.set_grad_enabled(True)
    if case.function.startswith("vocabulary"):
        vocabulary(group, case)
    else:
        {"all_reduce_logps": reduced, "napo_loss_group": napo, "moments_group": moments}[case.function](group, case)


def cuts_of(o: dict[str, Any], W: int, seed: int) -> list[int]:
    """Where the shards begin and end: equal but for the last, or anywhere."""
    V = o["V"]
    if o["split"] == "anywhere":
        g = torch.Generator().manual_seed(seed + 11)
        return [0, *torch.randint(0, V + 1, (W - 1,), generator=g).sort().values.tolist(), V]
    width = -(-V // W)
    return [min(V, rank * width) for rank in range(W + 1)]


def vocabulary(group: Any, case: Case) -> None:
    o, W, rank = case.options, group.size(), group.rank()
    p, cuts = made(case), cuts_of(case.options, group.size(), case.seed)
    here = slice(cuts[rank], cuts[rank + 1])
    u = upstream(o["upstream"], (p.N,), case.seed)
    if o["split"] == "dtensor":
        return as_dtensors(group, p, u)
    x, parts = dict(p.tensors), {}
    for name, t in p.floating.items():
        if name in AXES:
            axis, t = AXES[name], t.detach()
            local = t.narrow(axis, here.start, here.stop - here.start)
            missing = -(-o["V"] // W) - local.shape[axis] if o["split"] == "padded" else 0
            if missing > 0:
                shape = list(t.shape)
                shape[axis] = missing
                local = torch.cat([local, torch.full(shape, 1e4, dtype=t.dtype)], axis)
            layout = o[f"{name}_layout"] if local.numel() else "dense"
            local = laid_out(local.clone(), "transposed" if layout == "expanded" else layout)
            x[name] = local.detach().requires_grad_(p.tensors[name].requires_grad)
            parts[name] = (..., here) if axis else (here,)
    before = Untouched(x)
    given = {"V": o["V"]} if o["split"] == "padded" else {"start": here.start, "V": o["V"]}
    found, grads = logps.called(p, u, x, group=group, **given)
    for name in parts.keys() & grads.keys():
        axis, size = AXES[name], here.stop - here.start
        extra = grads[name].narrow(axis, size, grads[name].shape[axis] - size)
        exactly(f"gradient of padding in {name}", bool(extra.any()), False)
        grads[name] = grads[name].narrow(axis, 0, size)
    logps.compare(p, found, grads, u, parts)
    written = ["logits"] if o.get("inplace") and grads else []
    before.check([("sum", found.sum), ("length", found.length), *grads.items()], written)


def as_dtensors(group: Any, p: Positions, u: Tensor) -> None:
    """As a tensor-parallel model hands it over."""
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    x = dict(p.tensors)
    for name, t in p.floating.items():
        axis = AXES.get(name)
        placement = Replicate() if axis is None else Shard(axis % t.dim())
        whole = t.detach().clone(memory_format=torch.contiguous_format)
        x[name] = distribute_tensor(whole, mesh, [placement]).requires_grad_(t.requires_grad)
    found, grads = logps.called(p, u, x)
    logps.compare(p, found, {name: g.full_tensor() for name, g in grads.items()}, u)


def reduced(group: Any, case: Case) -> None:
    """``all_reduce_logps``: sums over ranks, forward and backward."""
    o, W, rank = case.options, group.size(), group.rank()
    g = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, o["dtype"])
    x = -20 * torch.rand((W, 2, o["N"]), generator=g, dtype=torch.float64)
    if o["values"] != "normal":
        x[-1, 0, 0] = -torch.inf if o["values"] == "minus_inf" else torch.nan
    mine = [laid_out(t.to(dtype), "dense" if o["layout"] == "expanded" else o["layout"]).detach() for t in x[rank]]
    sums, lengths = mine[0].requires_grad_(), mine[1]
    before = Untouched({"sum": sums, "length": lengths})
    aux = torch.zeros(()) if o["rest"] else None
    found = napo_loss.all_reduce_logps(SequenceLogps(sums, lengths, aux_loss=aux), group)
    exact = x.to(dtype).double()
    plain = x.to(dtype).sum(0)
    u = torch.stack([upstream("normal", (o["N"],), case.seed + r) for r in range(W)])
    grad = torch.autograd.grad((found.sum * u[rank].to(dtype)).sum(), sums)[0]
    for i, name in enumerate(("sum", "length")):
        right = Expected(exact[:, i].sum(0), plain[i], exact[:, i].abs().sum(0), dtype, dtype)
        check(name, getattr(found, name), right)
    check("gradient of sum", grad, Expected(u.sum(0), u.to(dtype).sum(0), u.abs().sum(0), dtype, dtype))
    exactly("aux_loss", found.aux_loss is aux, True)
    before.check([("sum", found.sum), ("length", found.length), ("gradient of sum", grad)])


def counts_of(o: dict[str, Any], W: int, seed: int) -> list[int]:
    """Pairs of each rank."""
    g = torch.Generator().manual_seed(seed + 13)
    counts = torch.randint(1, 6, (W,), generator=g).tolist() if o["ragged"] else [o["B"]] * W
    if o["empty"]:
        counts[int(torch.randint(0, W, (), generator=g))] = 0
    return counts


def of_rank(case: Case, rank: int, B: int) -> Case:
    """The same settings, other numbers; values that are spoilt are so on rank 0 alone, to be seen on all."""
    spoilt = {} if rank == 0 and B else {"values": "normal"}
    return Case(case.seed + 100 * rank, case.function, {**case.options, "B": B, **spoilt})


def napo(group: Any, case: Case) -> None:
    o, W, rank = case.options, group.size(), group.rank()
    ranks = [pairs.made(of_rank(case, r, B)) for r, B in enumerate(counts_of(o, W, case.seed))]
    p, s = ranks[rank], pairs.settings(o)
    if "previous" in ranks[0].tensors:  # every rank has the same history
        for other in ranks[1:]:
            other.tensors["previous"] = ranks[0].tensors["previous"]
    before = Untouched(p.tensors)
    u = upstream(o["upstream"], tuple(p.tensors["policy_chosen"].shape), case.seed)

    def call(x: dict[str, Tensor]):
        return napo_loss.napo_loss(
            *pairs.arguments(p, x), beta=p.beta, recipe=pairs.recipe(o), previous_moments=pairs.previous(p),
            process_group=group,
        )  # fmt: skip

    found = objective.called(p, call, u)
    objective.compare(found, objective.expected_napo(ranks, s, u, rank), p.policy)
    before.check(found.items())


def moments(group: Any, case: Case) -> None:
    o, W, rank = case.options, group.size(), group.rank()
    cases = [of_rank(case, r, B) for r, B in enumerate(counts_of(o, W, case.seed))]
    margins = [estimates.margin_of(c.options, c.seed) for c in cases]
    masks = [estimates.mask_of(c.options, c.seed) for c in cases]
    mine, mask = margins[rank], masks[rank]
    before = estimates.previous_of(o, mine, case.seed)
    untouched = Untouched({"margin": mine})
    found = napo_loss.margin_moments(
        mine, q_from=o["q_from"], process_group=group, previous=before, decay=o["decay"], pair_mask=mask
    )._asdict()
    right = estimates.expected(
        estimates.formula_of_moments(o, masks, rank), [before, *margins], estimates.working(mine)
    )
    found["q"] = napo_loss.noise_level(
        mine, estimator=o["estimator"], alpha=o["alpha"], bounds=o["bounds"], q_from=o["q_from"], process_group=group,
        pair_mask=mask,
    )  # fmt: skip
    right |= estimates.expected(estimates.formula_of_q(o, masks, rank), margins, estimates.working(mine))
    estimates.finish(found, right, untouched)
