"""Calls ``sequence_logps`` and ``linear_sequence_logps``, and says what should come out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

import napo_loss
from napo_loss import LowRank, SequenceLogps, VocabShard

from .cases import Case
from .compare import FEW, Expected, Untouched, Wrong, check, exactly
from .positions import Positions, compiled, gradients, made, upstream
from .references import head_of, statistics_of, sums_of


def run(case: Case) -> None:
    """One call, compared; raises where it is wrong."""
    p = made(case)
    before = Untouched(p.tensors)
    if p.outside is not None and p.o["backend"] == "eager":
        try:
            call(p)
        except ValueError as error:
            if "labels must be in" in str(error):
                return
            raise
        raise Wrong("a label outside the vocabulary is no error")
    found, grads = called(p, upstream(p.o["upstream"], (p.N,), case.seed))
    compare(p, found, grads, upstream(p.o["upstream"], (p.N,), case.seed))
    tokens = () if found.tokens is None else found.tokens._asdict().items()
    written = ["logits"] if p.o.get("inplace") and p.o["call"] != "compile" and grads else []
    before.check([("sum", found.sum), ("length", found.length), *tokens, *grads.items()], written)
    if p.o["call"] == "again" and not written:
        twice, grads_again = called(p, upstream(p.o["upstream"], (p.N,), case.seed))
        for name, one, two in (("sum", found.sum, twice.sum), *((n, grads[n], grads_again[n]) for n in grads)):
            if not torch.equal(one.nan_to_num(7), two.nan_to_num(7)):
                raise Wrong(f"{name} is not the same bits in a second run")


def call(p: Positions, x: dict[str, Tensor] | None = None, group: Any = None, **shard: Any) -> SequenceLogps:
    """The function on the tensors of the case, or on ``x`` of the same names."""
    o, x = p.o, p.tensors if x is None else x
    options = {"shift": o["shift"], "ignore_index": p.ignore, "backend": o["backend"]}
    options |= {name: x[name] for name in ("token_weights", "cu_seqlens") if name in x}
    wraps = o["shard"] is not None or group is not None

    def wrapped(local: Any) -> Any:
        return VocabShard(local, group, **({"V": o["V"]} | shard)) if wraps else local

    if "logits" in x:
        logits = x["logits"]
        if o["inplace"]:
            options["inplace_backward"] = True
            logits = logits.view_as(logits)  # nobody writes over a leaf
        return napo_loss.sequence_logps(wrapped(logits), x["labels"], **options)
    head: Any = x["weight"]
    if "lora_A" in x:
        head = LowRank(head, x["lora_A"], x["lora_B"], o["lora_scale"])
    most = {"exact": max(1, len(p.at)), "more": len(p.at) + 3, "less": max(1, len(p.at) - 1), None: None}
    return napo_loss.linear_sequence_logps(
        x["hidden"], wrapped(head), x["labels"], bias=x.get("bias"), softcap=o["softcap"],
        logit_scale=o["logit_scale"], logits_budget=o["budget"], max_active=most[o["max_active"]],
        token_statistics=o["statistics"], **options,
    )  # fmt: skip


def called(p: Positions, u: Tensor, x: dict[str, Tensor] | None = None, **more: Any) -> tuple[SequenceLogps, dict]:
    """Results, and gradients of ``Σ u·sum`` by the names of the leaves that have one."""
    x = p.tensors if x is None else x
    how = p.o["call"]
    autocast = torch.autocast("cpu", getattr(torch, p.o["autocast"])) if how == "autocast" else nullcontext()
    with torch.no_grad() if how == "no_grad" else nullcontext(), autocast:
        function = (
            compiled(lambda given: call(p, given, **more)) if how == "compile" else lambda given: call(p, given, **more)
        )
        found = function(dict(x))
    leaves = {name: t for name, t in x.items() if t.requires_grad}
    if not leaves or how == "no_grad":
        exactly("requires_grad of sum", found.sum.requires_grad, False)
        return found, {}
    return found, gradients((found.sum * u.to(found.sum.dtype)).sum(), leaves)


class Evaluated(NamedTuple):
    out: dict[str, Tensor]
    grads: dict[str, Tensor]
    z: Tensor  # [A, V]
    dz: Tensor
    draw: Tensor


def evaluated(p: Positions, dtype: torch.dtype, u: Tensor) -> Evaluated:
    """The plain formula in ``dtype``, of the values that the products see."""
    V = p.o["V"]
    x, leaves = {}, {}
    for name in p.floating:
        value = p.values[name]
        if name != "bias":  # under autocast it is added as it is
            value = value.to(p.computed)
        leaves[name] = value.to(dtype).requires_grad_()
        axis = {"logits": -1, "weight": 0, "bias": 0, "lora_B": 0}.get(name)
        x[name] = leaves[name] if axis is None else leaves[name].narrow(axis, 0, V)
        if name in ("logits", "hidden"):
            x[name] = x[name].reshape(-1, x[name].shape[-1])
    raw, z = (x["logits"][p.at],) * 2 if "logits" in x else head_of(x, p.at, p.o)
    out = sums_of(z, p.labels, p.weights.to(dtype), p.member, p.N)
    wanted = {name: leaves[name] for name, t in p.floating.items() if t.requires_grad}
    total = (out["sum"] * u.to(dtype)).sum()
    found = torch.autograd.grad(total, [z, raw, *wanted.values()], materialize_grads=True)
    if p.o.get("statistics"):
        out |= statistics_of(z.detach(), p.labels)
    return Evaluated({k: v.detach() for k, v in out.items()}, dict(zip(wanted, found[2:], strict=True)), z, *found[:2])


def compare(p: Positions, found: SequenceLogps, grads: dict[str, Tensor], u: Tensor, parts: dict | None = None) -> None:
    """Against float64; ``parts`` are what this rank has of the gradients' first (or last) dimension."""
    if p.o.get("max_active") == "less" and len(p.at) > 1:
        counts = torch.zeros(p.N, dtype=torch.long).index_add(0, p.member, (p.weights != 0).long()) > 0
        return exactly("sum beyond max_active", bool(found.sum[counts].isnan().all()), True)
    if p.outside is not None:
        exactly("a sum with a label outside", bool(found.sum[p.outside].isnan()), True)
        keep = torch.arange(p.N) != p.outside
        return exactly("other sums", bool(found.sum[keep].isnan().any()), False)
    exact, plain = evaluated(p, torch.float64, u), evaluated(p, p.work, u)
    magnitudes = spreads(p, exact, u)
    for name in ("sum", "length"):
        check(
            name, getattr(found, name),
            Expected(exact.out[name], plain.out[name], magnitudes[name], p.work, p.work),
        )  # fmt: skip
    exactly("requires_grad of length", found.length.requires_grad, False)
    if overflows(p, exact):
        grads = {}  # in half precision a linear layer's are inf and NaN, too
    for name, grad in grads.items():
        own = p.floating[name].dtype
        right = Expected(
            exact.grads[name], plain.grads[name], magnitudes[name], p.work, own, magnitudes[f"{name} coarse"]
        )
        part = (parts or {}).get(name)
        check(f"gradient of {name}", grad, right if part is None else right.at(part))
    if p.o.get("statistics"):
        compare_statistics(p, found, exact, plain, magnitudes)


def overflows(p: Positions, exact: Evaluated) -> bool:
    """Whether gradients of logits that are stored on the way are beyond the dtype of the factors."""
    return "hidden" in p.floating and bool((exact.draw.abs() > torch.finfo(p.computed).max).any())


BASE = 41.0
"""Nats below its largest logit, at most, of what a kernel subtracts from a row: its exponents are rounded so much."""


def compare_statistics(p: Positions, found: SequenceLogps, exact: Evaluated, plain: Evaluated, m: dict) -> None:
    tokens, shape = found.tokens, p.tensors["labels"].shape
    if tokens is None:
        raise Wrong("no token statistics")

    def spread_out(x: Tensor) -> Tensor:
        return torch.zeros(shape.numel(), dtype=x.dtype).index_copy(0, p.at, x).view(shape)

    for name in ("entropy", "mean_logits"):
        right = [spread_out(e.out[name]) for e in (exact, plain)]
        check(f"tokens.{name}", getattr(tokens, name), Expected(*right, spread_out(m[name]), p.work, p.work))
    lead, doubt = exact.out["lead"], FEW * torch.finfo(p.work).eps * m["lead"]
    top, hit = tokens.is_top1.flatten()[p.at], lead >= 0
    wrong = (top != hit) & ((lead.abs() > doubt) | (doubt == 0)) & ~lead.isnan()
    exactly("a wrong top-1 hit", bool(wrong.any()), False)
    masked = torch.ones(shape.numel(), dtype=torch.bool)
    masked[p.at] = False
    exactly("a top-1 hit where nothing is predicted", bool(tokens.is_top1.flatten()[masked].any()), False)


def spreads(p: Positions, exact: Evaluated, u: Tensor) -> dict[str, Tensor]:
    """How far one rounding moves each result: sums of absolute values. Those called coarse, in the factors' dtype."""
    o, V = p.o, p.o["V"]
    with torch.no_grad():
        z, weight = exact.z.nan_to_num(0, 0, 0), p.weights
        logs = exact.z.log_softmax(-1)
        prob, logs = logs.exp().nan_to_num(0, 0, 0), logs.nan_to_num(0, 0, 0)
        raw = raw_spread(p)  # [A, V]
        # A kernel's tanh, made of exponentials, is right to a rounding of 1, not of itself.
        capped = o["softcap"] if o.get("softcap") and o["backend"] == "triton" else 0.0
        most = 2 * (raw.amax(1) + capped)
        base = BASE / FEW if o["backend"] == "triton" else 0.0
        token = logs.gather(1, p.labels[:, None])[:, 0].abs() + torch.tensor(float(V)).log() + 1 + most
        zeros = torch.zeros(p.N, dtype=torch.float64)
        found = {"sum": zeros.index_add(0, p.member, weight.abs() * token)}
        found["length"] = zeros.index_add(0, p.member, weight.abs())
        w = (u[p.member] * weight).abs()[:, None]
        dz = w * (prob * (1 + logs.abs() + base + most[:, None])).scatter_add(1, p.labels[:, None], torch.ones_like(w))
        slope = 1.0
        if o.get("softcap"):
            slope = 1 - (z / o["softcap"]) ** 2
            dz = dz * slope + exact.dz.abs().nan_to_num(0, 0, 0) * (1 + 2 * raw * slope / o["softcap"])
        scale = o.get("logit_scale") or 1.0
        half = torch.finfo(p.computed).eps if p.computed.itemsize == 2 else 0.0
        least = torch.finfo(p.computed).smallest_normal if half else 0.0
        stored = exact.draw.abs().nan_to_num(0, 0, 0) + least * w.clamp_min(1)
        found |= passed_on(p, scale * dz)
        found |= {f"{name} coarse": FEW / 2 * half * x for name, x in passed_on(p, stored).items()}
        if o.get("statistics"):
            entropy = exact.out["entropy"].nan_to_num(0)
            found["entropy"] = (1 + entropy + torch.tensor(float(V)).log()) * (1 + most)
            found["mean_logits"] = z.abs().mean(1) + raw.mean(1) + capped
            found["lead"] = most
    return found


def raw_spread(p: Positions) -> Tensor:
    """``|h|·|W|ᵀ`` and what else is added up to a logit, scaled; nothing where logits are given."""
    if "hidden" not in p.floating:
        return torch.zeros(len(p.at), p.o["V"], dtype=torch.float64)
    a = absolute(p)
    raw = a["hidden"] @ a["weight"].T
    if "lora_A" in a:
        raw = raw + abs(p.o["lora_scale"]) * (a["hidden"] @ a["lora_A"].T) @ a["lora_B"].T
    return (raw + a.get("bias", 0)) * (p.o["logit_scale"] or 1.0)


def absolute(p: Positions) -> dict[str, Tensor]:
    """Of the head, float64, without padding; ``hidden`` of the active positions."""
    a = {name: t.double().abs().nan_to_num(0) for name, t in p.values.items()}
    a["hidden"] = a["hidden"].reshape(-1, p.o["D"])[p.at]
    return {name: t[: p.o["V"]] if name in ("weight", "bias", "lora_B") else t for name, t in a.items()}


def passed_on(p: Positions, draw: Tensor) -> dict[str, Tensor]:
    """Absolute values of the logits' gradient ``[A, V]`` to those of every leaf's."""

    def placed(x: Tensor, like: Tensor) -> Tensor:
        flat = torch.zeros(like.shape[:-1].numel(), x.shape[1], dtype=torch.float64).index_add(0, p.at, x)
        return torch.nn.functional.pad(flat, (0, like.shape[-1] - x.shape[1])).view(like.shape)

    if "logits" in p.floating:
        return {"logits": placed(draw, p.tensors["logits"])}
    a, s = absolute(p), abs(p.o["lora_scale"])
    found = {"hidden": draw @ a["weight"], "weight": draw.T @ a["hidden"], "bias": draw.sum(0)}
    if "lora_A" in a:
        through = draw @ a["lora_B"]
        found["hidden"] = found["hidden"] + s * through @ a["lora_A"]
        found |= {"lora_A": s * through.T @ a["hidden"], "lora_B": s * draw.T @ (a["hidden"] @ a["lora_A"].T)}
    found["hidden"] = placed(found["hidden"], p.tensors["hidden"])
    extra = {
        name: p.tensors[name].shape[0] - len(found[name]) for name in ("weight", "bias", "lora_B") if name in p.tensors
    }
    for name, rows in extra.items():
        found[name] = torch.cat([found[name], found[name].new_zeros(rows, *found[name].shape[1:])])
    return {name: x for name, x in found.items() if name in p.tensors}
