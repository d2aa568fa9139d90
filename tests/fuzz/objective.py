"""Calls the objective and the estimators of noise, and says what should come out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import napo_loss
from napo_loss import NaPOOutput
from ranks import objective_is

from . import pairs, references
from .cases import Case
from .compare import Expected, Untouched, Wrong, check, exactly
from .pairs import Pairs
from .positions import compiled, gradients, upstream

Numbers = dict[str, Tensor]


@contextmanager
def modes(o: dict[str, Any]):
    autocast = torch.autocast("cpu", getattr(torch, o["autocast"])) if o["call"] == "autocast" else nullcontext()
    with torch.no_grad() if o["call"] == "no_grad" else nullcontext(), autocast:
        yield


def results(out: NaPOOutput, K: int | None) -> Numbers:
    """With the dimension of the negatives, and by name."""
    found = {
        name: getattr(out, name) for name in ("losses", "chosen_rewards", "rejected_rewards", "q", "weights", "moments")
    }
    if K is None:
        found |= {name: found[name][None] for name in ("rejected_rewards", "q", "weights")}
        found["moments"] = found["moments"][:, None]
    return found


def with_gradients(formula: Callable[[Numbers], Numbers], x: Numbers, u: Tensor) -> Numbers:
    out = formula(x)
    leaves = {name: x[name] for name in ("policy_chosen", "policy_rejected")}
    total = (out["losses"] * u.to(out["losses"].dtype)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    named = zip(leaves, found, strict=True)
    return {name: t.detach() for name, t in out.items()} | {f"gradient of {name}": t for name, t in named}


def expected(
    formula: Callable[[Numbers], Numbers],
    values: Callable[[torch.dtype], Numbers],
    work: torch.dtype,
    u: Tensor,
    sure: tuple[str, ...] = (),
) -> dict[str, Expected]:
    """Every result and gradient. The spread of each is how far it moves when one argument after the other is nudged by
    the working precision, but for those that are ``sure`` (differences of which are exact)."""
    exact = with_gradients(formula, values(torch.float64), u)
    plain = with_gradients(formula, values(work), u)
    eps = torch.finfo(work).eps
    spread = {name: t.abs() for name, t in exact.items()}
    for nudged in (*values(torch.float64), "nudge_q", "nudge_weights"):
        x = values(torch.float64)
        if nudged in sure or "mask" in nudged:
            continue
        if nudged in x:
            if x[nudged].numel() == 0:
                continue
            x[nudged] = (x[nudged].detach() * (1 + eps)).requires_grad_(x[nudged].requires_grad)
        else:
            x[nudged] = torch.tensor(eps, dtype=torch.float64)
        for name, t in with_gradients(formula, x, u).items():
            spread[name] = spread[name] + ((t - exact[name]) / eps).abs().nan_to_num(0, 0, 0)
    return {name: Expected(exact[name], plain[name], spread[name], work, work) for name in exact}


def sure(o: dict[str, Any]) -> tuple[str, ...]:
    """Policy and reference are equal, and their difference is exactly 0, whatever the estimate makes of it."""
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return names if o["values"] == "same" and o["reference"] and o["reference_dtype"] == "same" else ()


def compare(found: Numbers, right: dict[str, Expected], leaves: Numbers) -> None:
    for name, t in found.items():
        e = right[name]
        leaf = leaves.get(name.removeprefix("gradient of "))
        if leaf is not None:
            e.dtype = leaf.dtype
            if leaf.dim() == e.exact.dim() - 1:
                e = e.at((0,))
        check(name, t, e)
        if name not in ("losses",) and t.requires_grad:
            raise Wrong(f"{name} is differentiable")


def beta_of(p: Pairs, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(p.beta, dtype=torch.float64).clone().to(dtype)


def run_napo(case: Case) -> None:
    p = pairs.made(case)
    o, s, before = p.o, pairs.settings(p.o), Untouched(p.tensors)
    chosen = pairs.recipe(o)

    def call(x: Numbers) -> NaPOOutput:
        return napo_loss.napo_loss(
            *pairs.arguments(p, x), beta=p.beta, recipe=chosen, previous_moments=pairs.previous(p)
        )

    u = upstream(o["upstream"], (o["B"],), case.seed)
    found = called(p, call, u)
    compare(found, expected_napo([p], s, u), p.policy)
    before.check(found.items())
    if o["call"] == "again":
        same(found, called(p, call, u))


def expected_napo(
    ranks: list[Pairs], s: references.Settings, u: Tensor, rank: int = 0, given: Tensor | None = None
) -> dict:
    """Of one rank; the others' arguments move its q and weights."""
    p = ranks[rank]

    def values(dtype: torch.dtype) -> Numbers:
        others = {
            f"{n} of {r}": t.detach()
            for r, other in enumerate(ranks)
            if r != rank
            for n, t in other.values(dtype).items()
        }
        return p.values(dtype) | others | {"beta": beta_of(p, dtype)}

    def formula(x: Numbers) -> Numbers:
        parts = []
        for r in range(len(ranks)):
            end = f" of {r}"
            parts.append(x if r == rank else {n.removesuffix(end): t for n, t in x.items() if n.endswith(end)})
        out = references.napo(
            parts, s, x["beta"], rank=rank, given=None if given is None else given.to(x["beta"].dtype)
        )
        return {name: t for name, t in out.items() if name != "learned"}

    return expected(formula, values, p.work, u, sure(p.o))


def called(p: Pairs, call: Callable[[Numbers], NaPOOutput], u: Tensor) -> Numbers:
    o = p.o
    with modes(o), objective_is(fused=o["fused"]):
        out = (compiled(call) if o["call"] == "compile" else call)(dict(p.tensors))
        found = results(out, o["K"])
        if o["call"] == "no_grad":
            return found
    for name in ("reference_chosen", "reference_rejected"):
        if name in p.tensors and p.tensors[name].requires_grad:
            grad = torch.autograd.grad(out.losses.sum(), p.tensors[name], allow_unused=True, retain_graph=True)[0]
            exactly(f"gradient of {name}", grad is None or not bool(grad.any()), True)
    total = (out.losses * u.to(out.losses.dtype)).sum()
    return found | {f"gradient of {name}": t for name, t in gradients(total, p.policy).items()}


def same(one: Numbers, two: Numbers) -> None:
    for name, t in one.items():
        if not torch.equal(t.nan_to_num(7), two[name].nan_to_num(7)):
            raise Wrong(f"{name} is not the same bits in a second run")


def run_fixed(case: Case) -> None:
    p = pairs.made(case)
    o, B, K = p.o, p.o["B"], p.o["K"]
    g = torch.Generator().manual_seed(case.seed + 5)
    q: Any = o["q"]
    if isinstance(q, str):
        shape = {"[]": (), "[B]": (B,), "[K, 1]": (K, 1), "[K, B]": (K, B)}[q]
        q = torch.rand(shape, generator=g, dtype=torch.float64)
        if o["q_values"] != "uniform":
            edges = torch.tensor(
                [0.0, 1.0, 0.001] if o["q_values"] == "edges" else [1.5, -0.1, 0.5], dtype=torch.float64
            )
            q = edges[torch.randint(0, 3, shape, generator=g)]
        kind = p.tensors["policy_chosen"].dtype if o["q_dtype"] == "same" else getattr(torch, o["q_dtype"])
        if p.work != torch.float64 and kind == torch.float64:
            q = q.float()  # what the loss sees of it
        q = p.tensors["q"] = pairs.laid_out(q.to(kind), o["q_layout"])
    before = Untouched(p.tensors)

    def call(x: Numbers):
        x = {"q": q} | x
        logps = [x.get(name) for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")]
        return napo_loss.noise_aware_dpo_loss(*logps, beta=p.beta, q=x["q"], pair_mask=references.mask_of(x))

    def values(dtype: torch.dtype) -> Numbers:
        x = p.values(dtype) | {"beta": beta_of(p, dtype)}
        x["q"] = torch.as_tensor(q, dtype=torch.float64).clone().to(dtype)
        return x

    u = upstream(o["upstream"], tuple(p.tensors["policy_rejected"].shape), case.seed)
    with modes(o):
        out = (compiled(call) if o["call"] == "compile" else call)(dict(p.tensors))
    exactly("type", type(out), napo_loss.PreferenceLoss)
    found = out._asdict()
    if o["call"] != "no_grad":
        total = (out.losses * u.to(out.losses.dtype)).sum()
        found |= {f"gradient of {name}": t for name, t in gradients(total, p.policy).items()}
    rows = u if K is not None else u[None]
    right = expected(lambda x: references.fixed_q(x, x["beta"]), values, p.work, rows, (*sure(o), "q"))
    if K is None:
        right |= {name: right[name].at((0,)) for name in ("losses", "rejected_rewards")}
    compare(found, right, p.policy)
    before.check(found.items())
