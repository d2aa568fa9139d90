"""The objective against its formulas in float64: values, gradients, limits, symmetries, every bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from napo_loss import (
    RELEASED,
    Moments,
    Negative,
    Recipe,
    SequenceLogps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    reference,
)
from napo_loss.objective.checks import checked_beta

batches = st.integers(1, 9)
seeds = st.integers(0, 2**31)
qs = st.one_of(st.sampled_from([0.0, 0.001, 1.0]), st.floats(0, 1))


def logps(seed: int, *shape: int, scale: float = 20.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, dtype=torch.float64, generator=generator)


def four(seed: int, B: int, K: int | None = None, scale: float = 20.0) -> tuple[torch.Tensor, ...]:
    rows = (B,) if K is None else (K, B)
    return (
        logps(seed, B, scale=scale),
        logps(seed + 1, *rows, scale=scale),
        logps(seed + 2, B, scale=scale),
        logps(seed + 3, *rows, scale=scale),
    )


# noise_aware_dpo_loss


@given(seeds, batches, qs, st.floats(0.01, 2))
def test_loss_is_the_formula(seed, B, q, beta):
    pc, pr, rc, rr = four(seed, B)
    margin = (pc - pr) - (rc - rr)
    out = noise_aware_dpo_loss(pc, pr, rc, rr, beta=beta, q=q)
    # The printed form cancels to nothing as q → 0, where the limit is DPO: the tolerance is its error, not ours.
    expected = reference.noise_aware_dpo_loss(margin, beta, q if q > 1e-7 else 0.0)
    torch.testing.assert_close(out.losses, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(out.chosen_rewards, beta * (pc - rc))
    torch.testing.assert_close(out.rejected_rewards, beta * (pr - rr))


@given(seeds, batches)
def test_limits_are_dpo_and_mae(seed, B):
    pc, pr, rc, rr = four(seed, B)
    x = 0.1 * ((pc - pr) - (rc - rr))
    dpo = noise_aware_dpo_loss(pc, pr, rc, rr, beta=0.1, q=0.0).losses
    torch.testing.assert_close(dpo, -torch.nn.functional.logsigmoid(x))
    tiny = noise_aware_dpo_loss(pc, pr, rc, rr, beta=0.1, q=1e-12).losses
    torch.testing.assert_close(tiny, dpo)
    mae = noise_aware_dpo_loss(pc, pr, rc, rr, beta=0.1, q=1.0).losses
    torch.testing.assert_close(mae, 1 - torch.sigmoid(x))


@given(seeds, batches, qs)
def test_gradient_is_the_dpo_gradient_times_p_to_the_q(seed, B, q):
    pc, pr, rc, rr = four(seed, B)
    pc.requires_grad_()
    noise_aware_dpo_loss(pc, pr, rc, rr, beta=0.3, q=q).losses.sum().backward()
    p = torch.sigmoid(0.3 * ((pc - pr) - (rc - rr))).detach()
    torch.testing.assert_close(pc.grad, -0.3 * p**q * (1 - p))


@pytest.mark.parametrize("q", [0.0, 0.001, 0.37, 1.0])
def test_gradcheck_first_and_second(q):
    pc, pr, rc, rr = four(0, 3, K=2)
    inputs = (pc.requires_grad_(), pr.requires_grad_())

    def loss(pc, pr):
        return noise_aware_dpo_loss(pc, pr, rc, rr, beta=0.3, q=torch.tensor([[q], [0.5]])).losses

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


@given(seeds, qs, st.floats(-30, 30), st.floats(0.01, 20))
def test_loss_falls_as_the_margin_grows(seed, q, margin, step):
    zero = torch.zeros(2, dtype=torch.float64)
    chosen = torch.tensor([margin, margin + step], dtype=torch.float64)
    losses = noise_aware_dpo_loss(chosen, zero, zero, zero, beta=0.5, q=q).losses
    assert losses[1] < losses[0]


@given(seeds, batches)
def test_swapping_chosen_and_rejected_negates_the_margin(seed, B):
    pc, pr, rc, rr = four(seed, B)
    there = noise_aware_dpo_loss(pc, pr, rc, rr, q=1.0)
    back = noise_aware_dpo_loss(pr, pc, rr, rc, q=1.0)
    torch.testing.assert_close(there.losses + back.losses, torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(there.chosen_rewards, back.rejected_rewards)


@given(seeds, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), qs)
def test_any_dtype_is_computed_in_float32(seed, dtype, q):
    inputs = [x.to(dtype) for x in four(seed, 5)]
    low = noise_aware_dpo_loss(*inputs, q=q).losses
    assert low.dtype == torch.float32
    high = noise_aware_dpo_loss(*(x.double() for x in inputs), q=q).losses
    torch.testing.assert_close(low.double(), high, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [-1e4, -90.0, 0.0, 90.0, 1e4])
@pytest.mark.parametrize("q", [0.0, 0.001, 1.0, torch.tensor(0.0), torch.tensor([0.001])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_margins_stay_finite(margin, q, dtype):
    chosen = torch.full((1,), margin, dtype=dtype, requires_grad=True)
    zero = torch.zeros(1)
    losses = noise_aware_dpo_loss(chosen, zero, zero, zero, beta=1.0, q=q).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    if float(q) == 0.001 and margin == 0:
        assert losses.item() == pytest.approx(math.log(2), rel=1e-3)  # the printed form gives 0 in bf16


def test_q_takes_every_shape_that_broadcasts():
    inputs = four(3, 4, K=3)
    values = torch.rand(3, 4, dtype=torch.float64)
    for q in (values, values[:, :1], values[0], values[0, 0]):
        losses = noise_aware_dpo_loss(*inputs, q=q).losses
        for k in range(3):
            for b in range(4):
                pair = (inputs[0][b : b + 1], inputs[1][k, b : b + 1], inputs[2][b : b + 1], inputs[3][k, b : b + 1])
                one = noise_aware_dpo_loss(*pair, q=q.expand(3, 4)[k, b].item()).losses
                torch.testing.assert_close(losses[k, b : b + 1], one)


def test_a_tensor_q_outside_its_range_is_a_visible_nan():
    inputs = four(0, 3)
    losses = noise_aware_dpo_loss(*inputs, q=torch.tensor([0.5, 1.5, -0.1])).losses
    assert losses.isnan().tolist() == [False, True, True]


# noise_level


@given(seeds, batches, st.floats(0.001, 1))
def test_noise_level_is_the_formula(seed, B, alpha):
    margin = logps(seed, B) + 5
    torch.testing.assert_close(noise_level(margin, alpha=alpha), reference.noise_level(margin, alpha))


def test_noise_level_reads_rows_and_samples():
    margin = logps(0, 3, 5) + 5
    torch.testing.assert_close(noise_level(margin), torch.stack([noise_level(row) for row in margin]))
    each = noise_level(margin, q_from="each_pair")
    torch.testing.assert_close(each, (2 * torch.sigmoid(-0.01 * margin)).clamp(0.001, 1))


def test_noise_level_is_detached_and_bounded():
    margin = torch.full((2,), 1e6, requires_grad=True)
    q = noise_level(margin, bounds=(0.2, 0.9))
    assert not q.requires_grad
    assert q == pytest.approx(0.2)
    assert noise_level(-margin, bounds=(0.2, 0.9)) == pytest.approx(0.9)


def test_q_depends_on_accumulation_unless_the_caller_estimates_it_once():
    pc, pr, rc, rr = four(7, 8, scale=40.0)
    pr[:4] -= 200  # the first micro-batch is already learned, the second is not
    whole_q = noise_level((pc - pr) - (rc - rr))
    parts = [slice(0, 4), slice(4, 8)]
    naive = torch.cat([napo_loss(pc[s], pr[s], rc[s], rr[s]).losses for s in parts])
    whole = napo_loss(pc, pr, rc, rr).losses
    assert not torch.allclose(naive, whole)
    once = torch.cat([noise_aware_dpo_loss(pc[s], pr[s], rc[s], rr[s], q=whole_q).losses for s in parts])
    torch.testing.assert_close(once, whole)


# napo_loss


def released(pc, negatives, rc, references, lengths, beta=0.1):
    """What the released code runs with one of its fixed triples of weights, in numpy, float64."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    recipe = {"rejected": (None, None, 0.04), "question_only": (0.5, "mean", 0.48), "image_only": (0.01, "sum", 0.48)}
    total, qs = 0.0, {}
    for name, (alpha, kind, weight) in recipe.items():
        margin = (pc - negatives[name]) - (rc - references[name])
        p = sigmoid(beta * margin)
        if alpha is None:
            total = total - weight * np.log(p)
            continue
        seen = margin
        if kind == "mean":
            seen = (pc - rc) / lengths["chosen"] - (negatives[name] - references[name]) / lengths[name]
        qs[name] = np.clip(2 * (1 - sigmoid(alpha * seen.mean())), 0.001, 1)
        total = total + weight * (1 - p ** qs[name]) / qs[name]
    return total, qs


@given(seeds, st.integers(1, 6), st.permutations(list(RELEASED.named)))
def test_fixed_weights_are_a_triple_of_the_released_code(seed, B, names):
    pc, pr, rc, rr = four(seed, B, K=3, scale=300.0)
    length = {name: 1 + logps(seed + i, B).abs().round() for i, name in enumerate(["chosen", *names])}
    out = napo_loss(
        SequenceLogps(pc, length["chosen"]),
        {name: SequenceLogps(pr[k], length[name]) for k, name in enumerate(names)},
        rc,
        {name: rr[k] for k, name in enumerate(names)},
        recipe=Recipe(weights="fixed"),
    )
    arrays = [{name: x[k].numpy() for k, name in enumerate(names)} for x in (pr, rr)]
    losses, qs = released(pc.numpy(), arrays[0], rc.numpy(), arrays[1], {n: x.numpy() for n, x in length.items()})
    np.testing.assert_allclose(out.losses.numpy(), losses, rtol=1e-9, atol=1e-12)  # 1 − p**q cancels
    assert {n: out.q[k].item() for k, n in enumerate(names) if n in qs} == pytest.approx(qs)
    assert out.q[names.index("rejected")] == 0
    np.testing.assert_allclose(out.rejected_rewards.numpy(), 0.1 * (pr - rr).numpy())


@given(seeds, batches)
def test_one_negative_is_estimate_then_loss(seed, B):
    inputs = four(seed, B, scale=300.0)
    q = noise_level((inputs[0] - inputs[1]) - (inputs[2] - inputs[3]))
    out = napo_loss(*inputs)
    expected = noise_aware_dpo_loss(*inputs, q=q)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(out.q, q)
    assert len(out) == 3
    assert out.q.shape == out.weights.shape == ()


@given(seeds, batches, st.integers(1, 4))
def test_batch_order_and_duplicated_negatives_change_nothing(seed, B, K):
    pc, pr, rc, rr = four(seed, B, K=K)
    out = napo_loss(pc, pr, rc, rr)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = napo_loss(pc[order], pr[:, order], rc[order], rr[:, order])
    torch.testing.assert_close(permuted.losses, out.losses[order])
    twice = napo_loss(pc, pr.repeat(2, 1), rc, rr.repeat(2, 1))
    torch.testing.assert_close(twice.losses, out.losses)


def test_a_mapping_is_its_stacked_rows():
    pc, pr, rc, rr = four(1, 4, K=2)
    recipe = Recipe({"a": Negative(alpha=0.1), "b": Negative(q=0.3, weight=2.0)})
    stacked = napo_loss(pc, pr, rc, rr, recipe=recipe)
    mapped = napo_loss(pc, {"b": pr[1], "a": pr[0]}, rc, {"b": rr[1], "a": rr[0]}, recipe=recipe)
    torch.testing.assert_close(mapped.losses, stacked.losses)
    torch.testing.assert_close(mapped.q, stacked.q.flip(0))


def test_reference_free_sft_and_average():
    pc, pr, rc, rr = four(5, 4)
    zero = torch.zeros_like(pc)
    torch.testing.assert_close(napo_loss(pc, pr, None, None).losses, napo_loss(pc, pr, zero, zero).losses)
    sft = napo_loss(pc, pr, rc, rr, recipe=Recipe(sft_weight=0.3)).losses
    torch.testing.assert_close(sft, napo_loss(pc, pr, rc, rr).losses - 0.3 * pc)
    length = torch.full_like(pc, 4.0)
    average = napo_loss(
        SequenceLogps(pc, length), SequenceLogps(pr, length), rc, rr,
        recipe=Recipe(Negative(margin="mean"), average_logps=True, sft_weight=0.3),
    )  # fmt: skip
    expected = napo_loss(pc / 4, pr / 4, rc / 4, rr / 4, recipe=Recipe(sft_weight=0.3))
    torch.testing.assert_close(average.losses, expected.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sequence_in_which_nothing_counts_has_a_mean_of_0_in_every_dtype(dtype):
    chosen = SequenceLogps(torch.tensor([0.0, -8.0], dtype=dtype), torch.tensor([0.0, 4.0], dtype=dtype))
    rejected = SequenceLogps(torch.tensor([-6.0, 0.0], dtype=dtype), torch.tensor([2.0, 0.0], dtype=dtype))
    assert chosen.mean.tolist() == [0, -2]
    assert chosen.mean.dtype == dtype
    out = napo_loss(chosen, rejected, None, None, recipe=Recipe(Negative(margin="mean", alpha=0.5)))
    assert out.moments.tolist() == [0.5, 6.5]  # margins of 3 and -2
    assert out.q.item() == pytest.approx(2 / (1 + math.exp(0.25)))


@pytest.mark.parametrize("estimator", ["released", "paper", "moment"])
@pytest.mark.parametrize("q_from", ["rank_means", "each_pair"])
def test_the_dtype_of_a_tensor_beta_is_not_that_of_the_loss(estimator, q_from):
    if (estimator, q_from) == ("moment", "each_pair"):
        return  # one pair says nothing
    pc, pr, rc, rr = (x.float() for x in four(7, 3, K=2))
    recipe = Recipe({"a": Negative(estimator=estimator), "b": Negative(q=0.5)}, q_from=q_from)
    plain = napo_loss(pc, pr, rc, rr, beta=0.1, recipe=recipe)
    for dtype in (torch.float64, torch.float16):
        beta = torch.tensor(0.1, dtype=dtype)
        out = napo_loss(pc, pr, rc, rr, beta=beta, recipe=recipe)
        for a, b in zip(
            (*out, out.q, out.weights, out.moments), (*plain, plain.q, plain.weights, plain.moments), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # and their dtypes


def test_each_pair_has_a_q_of_its_own():
    inputs = four(4, 5, K=2, scale=300.0)
    each = napo_loss(*inputs, recipe=Recipe(q_from="each_pair"))
    assert each.q.shape == (2, 5)
    assert each.moments.shape == (2, 2, 5)
    torch.testing.assert_close(each.q[0, 0], napo_loss(*(x[..., :1] for x in inputs)).q[0])


def test_moments_of_means_keep_no_graph():
    pc, pr, rc, rr = four(6, 3, K=2)
    chosen, rejected = (
        SequenceLogps(pc.requires_grad_(), torch.full((3,), 4.0)),
        SequenceLogps(pr, torch.full((2, 3), 5.0)),
    )
    recipe = Recipe({"rejected": Negative(), "image_only": Negative(margin="mean")})
    out = napo_loss(chosen, rejected, rc, rr, recipe=recipe)
    assert out.losses.requires_grad
    assert not any(x.requires_grad for x in (out.moments, out.q, out.weights))


def test_gradients_flow_to_the_policy_alone():
    inputs = [x.requires_grad_() for x in four(6, 3, K=2)]
    out = napo_loss(*inputs)
    assert not any(x.requires_grad for x in (out.chosen_rewards, out.rejected_rewards, out.q, out.weights))
    out.losses.sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert inputs[2].grad is None
    assert inputs[3].grad is None


def test_gradcheck_of_the_group():
    pc, pr, rc, rr = four(8, 3, K=3)
    length = torch.tensor([3.0, 5.0, 2.0], dtype=torch.float64)
    recipe = Recipe(
        {"a": Negative(q=0.0, weight=0.1), "b": Negative(q=0.4), "c": Negative(q=1.0)}, sft_weight=0.1,
        average_logps=True,
    )  # fmt: skip

    def loss(pc, pr):
        chosen, rejected = SequenceLogps(pc, length), SequenceLogps(pr, length.expand(3, 3))
        return napo_loss(chosen, rejected, rc, rr, beta=0.5, recipe=recipe).losses

    assert gradcheck(loss, (pc.requires_grad_(), pr.requires_grad_()))


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_pairs_splits_and_joins(seed, B, K):
    flat = logps(seed, B * (1 + K)).requires_grad_()
    chosen, rejected = SequenceLogps(flat, torch.ones(B * (1 + K))).pairs(K)
    assert chosen.sum.shape == chosen.length.shape == (B,)
    assert rejected.sum.shape == rejected.length.shape == ((B,) if K == 1 else (K, B))
    weight = torch.arange(1.0, 1 + B * (1 + K), dtype=torch.float64)
    loss = (chosen.sum * weight[:B]).sum() + (rejected.sum.flatten() * weight[B:]).sum()
    loss.backward()
    torch.testing.assert_close(flat.grad, weight)


def test_pairs_can_be_differentiated_twice():
    def loss(x):
        chosen, rejected = SequenceLogps(x, torch.ones(6)).pairs(2)
        return noise_aware_dpo_loss(chosen.sum, rejected.sum, None, None, beta=0.3, q=0.4).losses

    assert gradgradcheck(loss, (logps(0, 6).requires_grad_(),))


# Bad input: each error names the argument, what was given and what was expected.

GOOD = dict(
    zip(["pc", "pr", "rc", "rr"], [torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2)], strict=True)
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pc": torch.zeros(2, 1)}, ValueError, r"policy_chosen_logps must have shape \[B\], got \[2, 1\]"),
        ({"pc": [0.0, 1.0]}, TypeError, "policy_chosen_logps must be a torch.Tensor, got list"),
        ({"pc": torch.zeros(2, dtype=torch.long)}, TypeError, "policy_chosen_logps must be a floating-point"),
        ({"pr": torch.zeros(3)}, ValueError, r"policy_rejected_logps must have shape .* B = 2 .* got \[3\]"),
        ({"pr": torch.zeros(0, 2)}, ValueError, r"K >= 1, got \[0, 2\]"),
        ({"pr": torch.zeros(1, 1, 2)}, ValueError, r"got \[1, 1, 2\]"),
        ({"rc": torch.zeros(1)}, ValueError, r"reference_chosen_logps must have shape \[2\].* got \[1\]"),
        ({"rr": torch.zeros(4, 2)}, ValueError, r"reference_rejected_logps must have shape \[2\].* got \[4, 2\]"),
        ({"rr": None}, ValueError, "must both be given, or both be None"),
        ({"rc": torch.zeros(2, device="meta")}, ValueError, "reference_chosen_logps is on meta, but .* on cpu"),
        ({"pc": torch.zeros(0), "pr": torch.zeros(0), "rc": torch.zeros(0), "rr": torch.zeros(0)},
         ValueError, "policy_chosen_logps is empty"),
    ],
)  # fmt: skip
def test_bad_log_probs(change, error, message):
    arguments = list({**GOOD, **change}.values())
    with pytest.raises(error, match=message):
        noise_aware_dpo_loss(*arguments, q=0.5)
    with pytest.raises(error, match=message):
        napo_loss(*arguments)


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        noise_aware_dpo_loss(*GOOD.values(), beta=beta, q=0.5)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        napo_loss(*GOOD.values(), beta=beta)


def test_a_beta_that_cannot_be_looked_at_is_nan_where_it_is_wrong(monkeypatch):
    """On a GPU, or while a function is compiled."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    right, wrong = (0.1, 0.9, 1e30), (0.0, -0.1, math.inf, math.nan)
    assert [checked_beta(torch.tensor(x, dtype=torch.float64)).item() for x in right] == list(right)
    assert all(checked_beta(torch.tensor(x)).isnan() for x in wrong)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_q_must_be_in_its_range(q):
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\]"):
        noise_aware_dpo_loss(*GOOD.values(), q=q)
    with pytest.raises(ValueError, match=r"Negative.q must be None or in \[0, 1\]"):
        Negative(q=q)


def test_q_must_fit():
    with pytest.raises(ValueError, match=r"q must broadcast to the margin's shape \[2\], got \[3\]"):
        noise_aware_dpo_loss(*GOOD.values(), q=torch.ones(3))
    with pytest.raises(ValueError, match=r"got \[4, 2\]"):
        noise_aware_dpo_loss(*GOOD.values(), q=torch.ones(4, 2))
    with pytest.raises(TypeError, match="q must be a floating-point tensor"):
        noise_aware_dpo_loss(*GOOD.values(), q=torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ({"bounds": (0.5, 0.1)}, "bounds must satisfy"),
        ({"estimator": "median"}, r"estimator must be one of .*'released', 'paper', 'moment'.*, got 'median'"),
        ({"estimator": "moment", "alpha": 0.5}, "estimator='moment' has no slope, got alpha = 0.5"),
        ({"estimator": "moment", "q_from": "each_pair"}, "leaves it one pair"),
        ({"q_from": "sum"}, "q_from must be one of .*'rank_means', 'all_pairs', 'each_pair'.*, got 'sum'"),
    ],
)
def test_bad_estimator_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        noise_level(torch.zeros(2), **kwargs)


def test_moments_are_taken_as_they_come():
    """As one tensor, which a result carries and a checkpoint holds, or as two with names."""
    inputs, recipe = four(1, 4, K=2), Recipe(decay=0.5)
    first = napo_loss(*inputs, recipe=recipe)
    named = margin_moments((inputs[0] - inputs[1]) - (inputs[2] - inputs[3]))
    torch.testing.assert_close(torch.stack(named), first.moments)
    after = [napo_loss(*four(5, 4, K=2), recipe=recipe, previous_moments=x) for x in (first.moments, named)]
    torch.testing.assert_close(after[0].moments, after[1].moments)
    torch.testing.assert_close(noise_level(Moments(*first.moments)), first.q)
    for ignored in ({"q_from": "all_pairs"}, {"process_group": "a group"}):
        with pytest.raises(
            ValueError, match="margin is Moments, averaged already: give q_from, process_group and pair_mask to"
        ):
            noise_level(named, **ignored)


def test_bad_moments():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        margin_moments(torch.zeros(2), decay=1.0)
    with pytest.raises(ValueError, match=r"previous must be the moments of the step before, \[2, 3\], got shape \[2\]"):
        margin_moments(torch.zeros(3, 4), previous=margin_moments(torch.zeros(4)), decay=0.5)
    with pytest.raises(TypeError, match="previous must be the moments of the step before, got float"):
        margin_moments(torch.zeros(3), previous=0.5, decay=0.5)


def test_bad_margins():
    with pytest.raises(ValueError, match=r"margin must be a non-empty \[B\] or \[K, B\] tensor, got shape \[0\]"):
        noise_level(torch.zeros(0))
    with pytest.raises(TypeError, match=r"margin must be a torch.Tensor, got float"):
        noise_level(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "Negative.alpha must be > 0"),
        ({"margin": "median"}, "Negative.margin must be 'sum' or 'mean', got 'median'"),
        ({"weight": -1.0}, "Negative.weight must be >= 0"),
        ({"estimator": "mean"}, r"Negative.estimator must be one of .*'moment'.*, got 'mean'"),
    ],
)
def test_bad_negatives(settings, message):
    with pytest.raises(ValueError, match=message):
        Negative(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "learned"}, "Recipe.weights must be 'fixed' or 'dynamic', got 'learned'"),
        ({"q_from": "max"}, "Recipe.q_from must be"),
        ({"sft_weight": -1.0}, "Recipe.sft_weight must be >= 0"),
        ({"decay": -0.1}, r"Recipe.decay must be in \[0, 1\)"),
        ({"decay": 0.1, "q_from": "each_pair"}, "decay = 0.1 has nothing to smooth with q_from='each_pair'"),
        ({"negatives": Negative(estimator="moment"), "q_from": "each_pair"}, "leaves it one pair"),
    ],
)
def test_bad_recipes(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_names_and_counts_must_agree():
    row, rows = torch.zeros(2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"reference_rejected_logps must be given like policy_rejected_logps"):
        napo_loss(row, {"a": row}, row, {"b": row})
    with pytest.raises(ValueError, match=r"recipe.negatives names \['a'\], but policy_rejected_logps has \['b'\]"):
        napo_loss(row, {"b": row}, row, {"b": row}, recipe=Recipe({"a": Negative()}))
    with pytest.raises(ValueError, match=r"must be \[1, B\], got K = 3"):
        napo_loss(row, rows, row, rows, recipe=Recipe({"a": Negative()}))
    with pytest.raises(ValueError, match="is an empty mapping"):
        napo_loss(row, {}, row, {})
    with pytest.raises(ValueError, match=r"every negative in policy_rejected_logps must have shape \[B\]"):
        napo_loss(row, {"a": row, "b": torch.zeros(3)}, row, {"a": row, "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"previous_moments must be the moments of the step before, \[2, 3\], got"):
        napo_loss(row, rows, row, rows, previous_moments=torch.zeros(2))
    with pytest.raises(ValueError, match=r"previous_moments must be the moments of the step before, \[2\], got"):
        napo_loss(row, row, row, row, previous_moments=torch.zeros(2, 1))


def test_means_need_lengths():
    row = torch.zeros(2)
    with pytest.raises(ValueError, match=r"must be SequenceLogps\(sum, length\), which carry the lengths"):
        napo_loss(row, {"question_only": row}, row, {"question_only": row})
    bad = SequenceLogps(row, torch.ones(3))
    with pytest.raises(ValueError, match=r"the length of policy_chosen_logps must have shape \[2\]"):
        napo_loss(bad, SequenceLogps(row, torch.ones(2)), row, row, recipe=Recipe(average_logps=True))


def test_pairs_must_divide():
    with pytest.raises(ValueError, match=r"do not split into 1 chosen and K = 2 negatives"):
        SequenceLogps(torch.zeros(4), torch.ones(4)).pairs(2)
