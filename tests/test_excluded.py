"""Sequences that a model excludes: log-probs of −inf give the loss that is right, and no NaN where it is finite."""

import itertools
import math

import pytest
import torch

from napo_loss import Moments, NaPOLoss, Negative, Recipe, napo_loss, noise_aware_dpo_loss, noise_level
from napo_loss.objective.eager import dynamic_weights
from ranks import objective_is

INF = math.inf
BACKENDS = ["eager", "kernel"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy's, in the interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    with objective_is(fused=request.param == "kernel"):
        yield request.param


def run(chosen, rejected, recipe, **kwargs):
    leaves = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    out = napo_loss(*leaves, None, None, beta=0.1, recipe=recipe, **kwargs)
    out.losses[out.losses.isfinite()].sum().backward()
    return out, *(x.grad for x in leaves)


def by_hand(psi, q):
    """In float64, with the limits at ±inf written out."""
    if q == 0:
        return INF if psi == -INF else 0.0 if psi == INF else math.log1p(math.exp(-0.1 * psi))
    p = 0.0 if psi == -INF else 1.0 if psi == INF else 1 / (1 + math.exp(-0.1 * psi))
    return (1 - p**q) / q


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_losses_are_the_limits(backend, q, sft_weight):
    chosen, rejected = [-5.0, -INF, -7.0], [-6.0, -6.0, -INF]
    out, dchosen, drejected = run(chosen, rejected, Recipe(Negative(q=q), sft_weight=sft_weight))
    sft = [0.0 if sft_weight == 0 else -sft_weight * x for x in chosen]
    right = [by_hand(c - r, q) + s for c, r, s in zip(chosen, rejected, sft, strict=True)]
    assert out.losses.tolist() == pytest.approx(right, rel=1e-6)
    assert not out.losses.isnan().any()
    assert dchosen.isfinite().all()
    assert drejected.isfinite().all()
    finite = torch.tensor(right).isfinite()
    assert (drejected[finite] >= 0).all()
    if q:
        assert drejected[1] == 0  # flat there


def test_an_infinite_dpo_loss_has_the_gradient_of_dpo(backend):
    leaves = [torch.tensor([x], requires_grad=True) for x in (-INF, -6.0)]
    out = napo_loss(*leaves, None, None, beta=0.1, recipe=Recipe(Negative(q=0.0)))
    out.losses.sum().backward()
    assert out.losses.item() == INF
    assert [x.grad.item() for x in leaves] == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize(
    ("estimator", "q_below", "q_above"),
    [("released", 1.0, 0.001), ("paper", 1.0, 0.01), ("moment", 1.0, 1.0)],
)
def test_q_of_a_batch_with_such_a_pair(backend, estimator, q_below, q_above):
    """The mean margin is infinite too: q goes to its bound; the moment estimate, which has nothing to read, to 1."""
    recipe = Recipe(Negative(estimator=estimator))
    for chosen, rejected, q in (([-5.0, -INF], [-6.0, -6.0], q_below), ([-5.0, -6.0], [-6.0, -INF], q_above)):
        out, *grads = run(chosen, rejected, recipe)
        assert out.q.item() == pytest.approx(q)
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        assert out.losses.tolist() == pytest.approx([by_hand(psi, q) for psi in margins], rel=1e-5)
        assert all(g.isfinite().all() for g in grads)
        assert noise_level(torch.tensor(margins), estimator=estimator).item() == pytest.approx(q)


def test_a_pair_of_which_both_are_excluded_is_a_visible_nan(backend):
    out, *_ = run([-5.0, -INF], [-6.0, -INF], Recipe(Negative(q=0.5)))
    assert out.losses.isnan().tolist() == [False, True]
    out, *_ = run([-5.0, -INF], [-6.0, -INF], Recipe(Negative()))
    assert out.q.isnan()
    assert out.losses.isnan().all()


def test_smoothing_forgets_what_was_infinite(backend):
    recipe = Recipe(Negative(), decay=0.5)
    module = NaPOLoss(0.1, recipe)
    module(torch.tensor([-5.0, -INF]), torch.tensor([-6.0, -6.0]), None, None)
    assert not module.previous_moments.isfinite().all()
    later = torch.tensor([100.0, 300.0]), torch.tensor([0.0, 0.0]), None, None
    plain = napo_loss(*later, beta=0.1, recipe=Recipe(Negative()))
    assert module(*later).q == plain.q
    assert torch.equal(module.previous_moments, plain.moments)
    history = torch.tensor([math.nan, 4.0])
    out = napo_loss(*later, beta=0.1, recipe=recipe, previous_moments=history)
    assert out.moments.tolist() == [200.0, 0.5 * 4 + 0.5 * 50000]


@pytest.mark.parametrize(
    ("margins", "shares"),
    [([INF, 1.0, 2.0], [1, 0.01, 0.01]), ([INF, INF, 1.0], [0.5, 0.5, 0.01]), ([-INF, 1e38, -1.0], [0.01, 1, 0.01])],
)
def test_dynamic_weights_of_infinite_gains(backend, margins, shares):
    recipe = Recipe({name: Negative(q=0.5) for name in "abc"}, weights="dynamic")
    out = napo_loss(torch.zeros(1), -torch.tensor(margins)[:, None], None, None, recipe=recipe)
    assert out.weights.tolist() == pytest.approx(shares, rel=1e-5)
    assert dynamic_weights(torch.tensor(margins)).tolist() == pytest.approx(shares, rel=1e-5)
    assert not out.losses.isnan().any()


def test_a_negative_without_weight_is_not_there(backend):
    recipe = Recipe({"a": Negative(q=0.0, weight=0.0), "b": Negative(q=0.5)}, weights="fixed")
    chosen, rejected = torch.tensor([-INF, -5.0]), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    out = napo_loss(chosen, rejected, None, None, recipe=recipe)
    alone = napo_loss(chosen, rejected[1], None, None, recipe=Recipe(Negative(q=0.5)))
    torch.testing.assert_close(out.losses, alone.losses)


def test_a_reference_that_excludes_makes_any_policy_better(backend):
    reference = torch.tensor([-INF, -5.0]), torch.tensor([-5.0, -INF])
    out = napo_loss(
        torch.full((2,), -4.0), torch.full((2,), -4.0), *reference, beta=0.1, recipe=Recipe(Negative(q=0.5))
    )
    assert out.losses.tolist() == [0.0, 2.0]
    assert out.chosen_rewards.tolist()[0] == INF


@pytest.mark.parametrize("q", [0.0, 0.5, torch.tensor(0.0), torch.tensor(0.5)])
def test_noise_aware_dpo_loss_alone(q):
    for c, r in itertools.product((-1.0, -INF), (-1.0, -INF)):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (c, r))
        losses = noise_aware_dpo_loss(chosen, rejected, None, None, q=q).losses
        psi = c - r
        if math.isnan(psi):
            assert losses.isnan()
            continue
        assert losses.item() == pytest.approx(by_hand(psi, float(q)))
        losses.sum().backward()
        assert chosen.grad.isfinite()
        assert rejected.grad.isfinite()


def test_moments_that_are_infinite_give_no_nan():
    for estimator in ("released", "paper", "moment"):
        for mean in (INF, -INF):
            assert noise_level(Moments(torch.tensor(mean), torch.tensor(INF)), estimator=estimator).isfinite()
