"""From logits or hidden states to the gradient of the loss: each part is compared given what the one before it made."""

from __future__ import annotations

import torch

import napo_loss
from ranks import objective_is

from . import logps, objective, pairs
from .cases import Case
from .compare import Untouched, exactly
from .positions import made, upstream


def parts(case: Case) -> tuple[Case, Case]:
    """The case of the log-probs, with as many sequences as the pairs need, and that of the objective."""
    first, second = case.part(case.options["path"]), case.part("napo_loss")
    B, K = min(4, second.options["B"]), min(3, second.options["K"] or 1)
    K = 3 if second.options["recipe"] in ("released", "paper", "scale_free") else K
    own = {"N": B * (1 + K), "call": "plain", "outside": False}
    if "max_active" in first.options and first.options["max_active"] == "less":
        own["max_active"] = "exact"
    own["trained"] = True if "logits" in first.function or first.function == "sequence_logps" else "all"
    first = first.changed(**own)
    dtype = "float64" if first.options["dtype"] == "float64" else "float32"
    K = None if K == 1 else K
    second = second.changed(
        B=B, K=K, dtype=dtype, reference_dtype="same", call="plain", lengths="float", references_trained=False,
        values="normal", named=second.options["named"] and K is not None,
    )  # fmt: skip
    return first, second


def run(case: Case) -> None:
    first, second = parts(case)
    p = made(first)
    before = Untouched(p.tensors)
    found = logps.call(p)
    K = second.options["K"] or 1
    chosen, rejected = found.pairs(K)
    policy = {"policy_chosen": chosen.sum, "policy_rejected": rejected.sum}
    lengths = {"chosen_length": chosen.length, "rejected_length": rejected.length}
    o = second.options
    exactly("pairs", torch.cat([chosen.sum, rejected.sum.flatten()]).nan_to_num(7), found.sum.nan_to_num(7))
    exactly("lengths of pairs", torch.cat([chosen.length, rejected.length.flatten()]), found.length)
    for each in (found, chosen, rejected):
        mean = torch.where(each.length == 0, each.sum, each.sum / each.length)
        if not bool((each.length < 0).any()):
            exactly(
                "mean",
                (each.mean - mean).nan_to_num(0).abs().max() <= 1e-6 * mean.nan_to_num(0, 0, 0).abs().max(),
                True,
            )
    q = pairs.made(second, policy, lengths)
    reads = pairs.settings(o)
    if not (reads.average or any(n.margin == "mean" and n.q is None for n in reads.negatives)):
        q.tensors = {name: x for name, x in q.tensors.items() if not name.endswith("length")}
    u = upstream(o["upstream"], (o["B"],), case.seed)
    with objective_is(fused=o["fused"]):
        out = napo_loss.napo_loss(
            *pairs.arguments(q), beta=q.beta, recipe=pairs.recipe(o), previous_moments=pairs.previous(q)
        )
    total = (out.losses * u.to(out.losses.dtype)).sum()
    leaves = {name: x for name, x in p.floating.items() if x.requires_grad}
    asked = [found.sum, chosen.sum, rejected.sum, *leaves.values()]
    dsum, dchosen, drejected, *grads = torch.autograd.grad(total, asked)
    right = objective.expected_napo([q], reads, u)
    rewards = objective.results(out, o["K"]) | {
        "gradient of policy_chosen": dchosen, "gradient of policy_rejected": drejected
    }  # fmt: skip
    exactly("gradient of sums", dsum.nan_to_num(7), torch.cat([dchosen, drejected.flatten()]).nan_to_num(7))
    objective.compare(rewards, right, policy)
    by_name = dict(zip(leaves, grads, strict=True))
    logps.compare(p, found, by_name, dsum.double())
    before.check([("sum", found.sum), *by_name.items()], ["logits"] if p.o.get("inplace") else [])
