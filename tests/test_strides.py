"""Every tensor argument of every public function, laid out in every way: what is read is the tensor, not its memory.

What lies between the elements is poison: NaN, or a label that no vocabulary has.
"""

import pytest
import torch
from torch import Tensor

from apart import apart
from fuzz.layouts import LAYOUTS, expanded
from napo_loss import (
    LowRank,
    Negative,
    Recipe,
    SequenceLogps,
    VocabShard,
    linear_sequence_logps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    sequence_logps,
)
from napo_loss.objective import loss as objective

N, T, D, V, B, K = 2, 5, 6, 11, 4, 3


def from_logits(x, backend):
    return sequence_logps(x["logits"], x["labels"], token_weights=x["token_weights"], backend=backend)


def packed_logits(x, backend):
    return sequence_logps(x["logits"], x["labels"], cu_seqlens=x["cu_seqlens"], backend=backend)


def columns(x, backend):
    return sequence_logps(VocabShard(x["logits"], None, V - 1), x["labels"], backend=backend)


def from_hidden(x, backend):
    head = LowRank(x["weight"], x["lora_A"], x["lora_B"], 0.5)
    return linear_sequence_logps(
        x["hidden"], head, x["labels"], bias=x["bias"], token_weights=x["token_weights"], softcap=20.0,
        logits_budget=7 * V * 4, backend=backend,
    )  # fmt: skip


def packed_hidden(x, backend):
    return linear_sequence_logps(x["hidden"], x["weight"], x["labels"], cu_seqlens=x["cu_seqlens"], backend=backend)


RECIPE = Recipe(
    {"a": Negative(margin="mean", weight=0.2), "b": Negative(estimator="moment"), "c": Negative(q=0.3, weight=0.5)},
    weights="fixed",
    decay=0.5,
)


def several_negatives(x, backend):
    def logps(name):
        return SequenceLogps(x[name], x[f"{name.split('_')[1]}_length"])

    out = napo_loss(
        *map(logps, ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")),
        recipe=RECIPE, previous_moments=x["previous_moments"],
    )  # fmt: skip
    return out.losses, out.chosen_rewards, out.rejected_rewards, out.q, out.weights, out.moments


def one_negative(x, backend):
    logps = [x[name] for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")]
    out = napo_loss(*logps)
    return out.losses, out.chosen_rewards, out.rejected_rewards, out.moments


def each_q(x, backend):
    logps = [x[name] for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")]
    return tuple(noise_aware_dpo_loss(*logps, q=x["q"]))


def moments(x, backend):
    found = margin_moments(x["margin"], previous=x["previous"], decay=0.5)
    return *found, noise_level(found, estimator="moment"), noise_level(x["margin"])


def tensors(function) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    labels = torch.randint(0, V - 1, (N, T), generator=g)
    labels[0, 2] = -100
    total = N * T
    heads = {"hidden": randn(N, T, D), "weight": randn(V, D)}
    logps = {"policy_chosen": randn(B) - 9, "reference_chosen": randn(B) - 9}
    single = {"policy_rejected": randn(B) - 12, "reference_rejected": randn(B) - 12}
    stacked = {"policy_rejected": randn(K, B) - 12, "reference_rejected": randn(K, B) - 12}
    return {
        from_logits: {"logits": randn(N, T, V), "labels": labels, "token_weights": randn(N, T).abs()},
        columns: {"logits": randn(N, T, V), "labels": labels},
        packed_logits: {
            "logits": randn(total, V), "labels": labels.flatten(), "cu_seqlens": torch.tensor([0, 3, total]),
        },
        from_hidden: {
            **heads, "labels": labels, "bias": randn(V), "token_weights": randn(N, T).abs(), "lora_A": randn(2, D),
            "lora_B": randn(V, 2),
        },
        packed_hidden: {
            "hidden": randn(total, D), "weight": heads["weight"], "labels": labels.flatten(),
            "cu_seqlens": torch.tensor([0, 3, total]),
        },
        several_negatives: {
            **logps, **stacked, "chosen_length": randn(B).abs() + 5, "rejected_length": randn(K, B).abs() + 7,
            "previous_moments": torch.stack([randn(K).abs(), randn(K).abs() + 9]),
        },
        one_negative: {**logps, **single},
        each_q: {**logps, **stacked, "q": torch.rand(K, B, generator=g)},
        moments: {"margin": randn(K, B), "previous": torch.stack([randn(K).abs(), randn(K).abs() + 9])},
    }[function]  # fmt: skip


FUNCTIONS = [
    from_logits, columns, packed_logits, from_hidden, packed_hidden, several_negatives, one_negative, each_q, moments,
]  # fmt: skip
CASES = [(f, name) for f in FUNCTIONS for name in tensors(f)]


def run(function, x: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Results, and gradients of everything that can have one."""
    x = {name: t.requires_grad_() if trained(name, t) else t for name, t in x.items()}
    results = [t for t in function(x, backend) if isinstance(t, Tensor)]
    leaves = [t for t in x.values() if t.requires_grad]
    differentiable = [t for t in results if t.requires_grad]
    if not differentiable:
        return results
    total = sum((t * torch.arange(1.0, 1 + t.numel()).view(t.shape)).sum() for t in differentiable)
    return [*results, *torch.autograd.grad(total, leaves)]


def trained(name: str, t: Tensor) -> bool:
    other = ("token_weights", "length", "previous", "moments", "reference", "q", "margin")
    return t.is_floating_point() and not any(word in name for word in other[:-2]) and name not in other


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("function", "name"), CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_layout_changes_nothing(backend, function, name, layout, monkeypatch):
    if layout is expanded and name == "cu_seqlens":
        pytest.skip("offsets rise")
    if backend == "triton":
        monkeypatch.setattr(objective, "_can_fuse", lambda batch, recipe: True)
    laid_out = {n: layout(t) if n == name else t for n, t in tensors(function).items()}
    expected = run(function, {n: t.clone(memory_format=torch.contiguous_format) for n, t in laid_out.items()}, backend)
    kept = laid_out[name].clone()
    found = run(function, laid_out, backend)
    assert torch.equal(laid_out[name].detach(), kept)  # nobody writes to an argument
    assert len(found) == len(expected) > 0
    apart(found, expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not a.isnan().any()
