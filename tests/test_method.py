"""What the paper prints, what its released code runs, and ours: estimators and recipes against float64 by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draws import quick
from napo_loss import (
    PAPER,
    RELEASED,
    SCALE_FREE,
    NaPOLoss,
    Negative,
    Recipe,
    SequenceLogps,
    margin_moments,
    napo_loss,
    noise_level,
    reference,
)
from napo_loss.objective import loss as objective
from napo_loss.objective.eager import dynamic_weights
from napo_loss.objective.recipes import METHODS, defaults
from ranks import objective_is

seeds = st.integers(0, 2**31)
NAMES = list(RELEASED.named)
BETA = 0.3


# The estimators


def margins(seed, *shape, scale=50.0, shift=20.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=g) + shift


@given(seeds, st.integers(1, 9), st.floats(0.001, 1))
def test_the_estimators_are_their_formulas(seed, B, alpha):
    margin = margins(seed, 3, B)
    for estimator in ("released", "paper"):
        found = noise_level(margin, alpha=alpha, estimator=estimator)
        torch.testing.assert_close(found, reference.noise_level(margin, alpha, estimator))
    expected = reference.noise_level(margin, estimator="moment")
    torch.testing.assert_close(noise_level(margin, estimator="moment"), expected)
    # From moments, and from margins in float32 and bfloat16, the same.
    moments = margin_moments(margin)
    torch.testing.assert_close(moments.square, (margin**2).mean(1))
    assert torch.equal(noise_level(moments, estimator="moment"), noise_level(margin, estimator="moment"))
    single = noise_level(margin.float(), estimator="moment")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_where_they_start_and_end():
    zero, far = torch.zeros(5), torch.full((5,), 1e4)
    starts = {name: noise_level(zero, estimator=name).item() for name in ("released", "paper", "moment")}
    assert starts == {"released": 1.0, "paper": 0.5, "moment": 1.0}
    ends = {name: noise_level(far, estimator=name).item() for name in starts}
    assert ends == pytest.approx({"released": 0.001, "paper": 0.01, "moment": 0.001})
    back = {name: noise_level(-far, estimator=name).item() for name in starts}
    assert back == {"released": 1.0, "paper": 1.0, "moment": 1.0}
    assert noise_level(far, estimator="paper", bounds=(0.2, 0.9)).item() == pytest.approx(0.2)


@given(seeds, st.integers(1, 200), st.floats(0, 0.5), st.floats(1e-3, 1e6))
def test_the_moment_estimator_reads_twice_the_flip_rate_at_any_scale(seed, half, rate, scale):
    """Margins mirrored at rate ε, all of one size: q = 2ε, whatever the size."""
    flips = round(rate * 2 * half)
    margin = torch.ones(2 * half, dtype=torch.float64)
    margin[:flips] = -1
    order = torch.randperm(2 * half, generator=torch.Generator().manual_seed(seed))
    q = noise_level(scale * margin[order], estimator="moment")
    torch.testing.assert_close(q.item(), min(max(2 * flips / (2 * half), 0.001), 1.0))


@given(seeds, st.integers(2, 30), st.floats(1e-2, 1e4))
def test_the_moment_estimator_has_no_scale(seed, B, scale):
    margin = margins(seed, B)
    q = noise_level(margin, estimator="moment")
    torch.testing.assert_close(noise_level(scale * margin, estimator="moment"), q)


@given(seeds, st.integers(1, 5), st.floats(0, 0.99))
def test_moments_are_smoothed_and_not_q(seed, K, decay):
    steps = [margins(seed + i, K, 4) for i in range(3)]
    recipe = Recipe({str(k): Negative(estimator="moment") for k in range(K)}, decay=decay)
    state, mean, square, out = None, None, None, None
    for margin in steps:
        state = margin_moments(margin, previous=state, decay=decay)
        new = margin.mean(1), (margin**2).mean(1)
        if mean is None:
            mean, square = new
        mean, square = decay * mean + (1 - decay) * new[0], decay * square + (1 - decay) * new[1]
        zero = torch.zeros(4, dtype=torch.float64)
        out = napo_loss(zero, -margin, None, None, recipe=recipe, previous_moments=None if out is None else out.moments)
    torch.testing.assert_close(state.mean, mean)
    torch.testing.assert_close(state.square, square)
    torch.testing.assert_close(out.moments, torch.stack([mean, square]))
    torch.testing.assert_close(out.q, noise_level(state, estimator="moment"))


# Dynamic weights


def printed(margin):
    return margin / margin.sum()


@given(st.integers(2, 6), st.lists(st.floats(-0.01, 0.01), min_size=6, max_size=6))
def test_rounding_noise_moves_no_weight(K, noise):
    weights = dynamic_weights(torch.tensor(noise[:K], dtype=torch.float64))
    assert (weights - 1 / K).abs().max() <= 0.05


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda x: sum(x) > 0.01), st.floats(3.5, 1e4))
def test_once_something_is_learned_the_weights_are_the_printed_ones(shares, total):
    """Three negatives, Σψ of 3.5 nats and more: rewards of 0.35 at β = 0.1."""
    margin = torch.tensor(shares, dtype=torch.float64)
    margin = total * margin / margin.sum()
    assert (dynamic_weights(margin) - printed(margin).clamp_min(0.01)).abs().max() <= 0.03


def test_weights_where_the_printed_rule_is_undefined():
    for margin in ([0.0, 0.0], [-1.0, -300.0]):
        torch.testing.assert_close(dynamic_weights(torch.tensor(margin)), torch.tensor([0.5, 0.5]))
    far = dynamic_weights(torch.tensor([200.0, -190.0]))
    torch.testing.assert_close(far, torch.tensor([0.99975, 0.01]), rtol=1e-5, atol=0)
    assert dynamic_weights(torch.tensor([math.nan, 1.0])).isnan().any()


# The recipes


def batch(seed, B, K=3):
    """Sums and lengths of a chosen and three negatives, policy and reference, in float64."""
    g = torch.Generator().manual_seed(seed)
    sums = {side: -200 * torch.rand(1 + K, B, dtype=torch.float64, generator=g) for side in ("policy", "reference")}
    return sums["policy"], sums["reference"], torch.randint(5, 50, (1 + K, B), generator=g).double()


def given_by_name(policy, reference, lengths):
    """As a trainer hands them over."""
    ours = [SequenceLogps(policy[k], lengths[k]) for k in range(4)]
    theirs = [SequenceLogps(reference[k], lengths[k]) for k in range(4)]
    return ours[0], dict(zip(NAMES, ours[1:], strict=True)), theirs[0], dict(zip(NAMES, theirs[1:], strict=True))


def by_hand(method, policy, reference, lengths, average=False):
    """Losses, q and weights of the three names, written out: ψ, then q, then γ, then L_q."""
    ratio = policy - reference
    token = ratio / lengths
    psi = {n: (token if average else ratio)[0] - (token if average else ratio)[k] for k, n in enumerate(NAMES, 1)}
    seen = {n: psi[n].detach() for n in NAMES}
    if method != "scale_free":
        seen["question_only"] = (token[0] - token[2]).detach()
    q = {}
    for name, alpha in (("rejected", None), ("question_only", 0.5), ("image_only", 0.01)):
        mean = seen[name].mean()
        if method == "scale_free":
            q[name] = (1 - mean / (seen[name] ** 2).mean().sqrt()).clamp(0.001, 1)
        elif alpha is None:
            q[name] = torch.tensor(0.0, dtype=torch.float64)
        elif method == "released":
            q[name] = (2 * (1 - torch.sigmoid(alpha * mean))).clamp(0.001, 1)
        else:
            q[name] = (1 - torch.sigmoid(alpha * BETA * mean)).clamp(0.01, 1)
    gain = {n: psi[n].detach().mean().clamp_min(0) + 0.05 for n in NAMES}
    weights = {n: (gain[n] / sum(gain.values())).clamp_min(0.01) for n in NAMES}
    losses = 0
    for name in NAMES:
        p = torch.sigmoid(BETA * psi[name])
        term = -p.log() if q[name] == 0 else (1 - p ** q[name]) / q[name]
        losses = losses + weights[name] * term
    return losses, torch.stack([q[n] for n in NAMES]), torch.stack([weights[n] for n in NAMES])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds, B=st.integers(1, 6))
def test_the_recipes_are_what_they_say(method, average, seed, B):
    policy, reference, lengths = batch(seed, B)
    policy.requires_grad_()
    recipe = METHODS[method]
    if average:  # then q reads what the loss reads
        recipe = Recipe(recipe.negatives, weights="dynamic", average_logps=True)
    expected, q, weights = by_hand(method, policy, reference, lengths, average)
    (expected_grad,) = torch.autograd.grad(expected.sum(), policy)
    out = napo_loss(*given_by_name(policy, reference, lengths), beta=BETA, recipe=recipe)
    (grad,) = torch.autograd.grad(out.losses.sum(), policy)
    # Written out, (1 − p^q)/q cancels where p is next to 1; L_q here does not.
    torch.testing.assert_close(out.losses, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(out.q, q)
    torch.testing.assert_close(out.weights, weights)


def recipe_on_ranks(group, method, seed, fused):
    """Every rank has two of the pairs; together they have the q, weights and gradients of one process."""
    policy, reference, lengths = batch(seed, 2 * group.size())
    whole = policy.requires_grad_()
    expected, q, weights = by_hand(method, whole, reference, lengths)
    (expected_grad,) = torch.autograd.grad(expected.sum(), whole)
    mine = slice(2 * group.rank(), 2 * group.rank() + 2)
    dtype = torch.float32 if fused else torch.float64
    policy, reference, lengths = (x[:, mine].detach().to(dtype) for x in (policy, reference, lengths))
    policy.requires_grad_()
    with objective_is(fused):
        out = napo_loss(
            *given_by_name(policy, reference, lengths), beta=BETA, recipe=METHODS[method], process_group=group
        )
        (grad,) = torch.autograd.grad(out.losses.sum(), policy)
    close = {"rtol": 1e-4, "atol": 1e-5} if fused else {"rtol": 1e-7, "atol": 1e-10}
    expected, expected_grad = expected[mine], expected_grad[:, mine]
    pairs = (out.losses, expected), (grad, expected_grad), (out.q, q), (out.weights, weights)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs.detach(), **close)


@pytest.mark.parametrize("fused", quick([True], [False, True]))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("W", quick([2], [2, 4]))
def test_the_recipes_on_ranks_are_those_of_one_process(ranks, W, method, fused):
    for seed in range(3):
        ranks.run(W, recipe_on_ranks, method, seed, fused)


def test_released_is_the_default_for_its_names_and_only_for_them():
    inputs = given_by_name(*batch(0, 4))
    torch.testing.assert_close(napo_loss(*inputs).losses, napo_loss(*inputs, recipe=RELEASED).losses)
    two = [x if isinstance(x, SequenceLogps) else {n: x[n] for n in NAMES[:2]} for x in inputs]
    out = napo_loss(*two)
    torch.testing.assert_close(out.weights, torch.full((2,), 0.5, dtype=torch.float64))
    assert out.q[0] == 0
    one = [x if isinstance(x, SequenceLogps) else {"rejected": x["rejected"]} for x in inputs]
    assert napo_loss(*one).q > 0  # an only negative is noise-aware


def test_defaults_by_name():
    named = defaults(PAPER, ["image_only", "rejected", "question_only"], 3)
    assert dict(named.named) == dict(PAPER.named)
    assert list(named.named) == ["image_only", "rejected", "question_only"]
    assert named.weights == "dynamic"
    mixed = defaults(SCALE_FREE, ["rejected", "paraphrase"], 2)
    assert dict(mixed.named) == {name: Negative(estimator="moment", weight=0.5) for name in ("rejected", "paraphrase")}
    assert mixed.weights == "fixed"
    assert dict(defaults(RELEASED, ["rejected", "other"], 2).named) == {
        "rejected": Negative(q=0.0, weight=0.5), "other": Negative(weight=0.5)
    }  # fmt: skip
    assert [n.estimator for n in defaults(PAPER, None, 2).named.values()] == ["paper", "paper"]


def test_the_papers_estimator_has_beta_inside_the_margin():
    zero = torch.zeros(4)
    recipe = Recipe(Negative(alpha=0.1, estimator="paper"))
    out = napo_loss(zero, -torch.full((4,), 50.0), None, None, beta=0.2, recipe=recipe)
    assert out.q.item() == pytest.approx(1 - 1 / (1 + math.exp(-0.1 * 0.2 * 50)))
    assert out.moments.tolist() == pytest.approx([50.0, 2500.0])  # moments are of ψ itself, for whoever reads them


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_recipes_compile_as_one_graph(method, fused, monkeypatch):
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: fused)
    torch._dynamo.reset()
    recipe = replace(METHODS[method], decay=0.5)
    policy, reference, lengths = (x.float() for x in batch(0, 4))
    policy.requires_grad_()

    def step(policy, previous):
        inputs = given_by_name(policy, reference, lengths)
        out = napo_loss(*inputs, beta=BETA, recipe=recipe, previous_moments=previous)
        return out.losses.mean(), out.q, out.weights, out.moments

    previous = step(policy, None)[-1]
    plain, compiled = step(policy, previous), torch.compile(step, fullgraph=True, backend="aot_eager")(policy, previous)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(found[0], policy)[0] for found in (compiled, plain)]
    torch.testing.assert_close(*grads)


def test_the_module_compiles_and_keeps_its_moments():
    torch._dynamo.reset()
    module, twin = (NaPOLoss(recipe=Recipe(Negative(estimator="moment"), decay=0.5)) for _ in range(2))
    compiled = torch.compile(twin, backend="aot_eager")
    for seed in range(3):
        chosen, rejected = margins(seed, 2, 4).float()
        for a, b in zip(compiled(chosen, rejected, None, None), module(chosen, rejected, None, None), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(twin.previous_moments, module.previous_moments)
