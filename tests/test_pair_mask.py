"""Padding pairs: a masked pair is as one that was dropped, whatever stands in its log-probs, on several ranks too."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import draws
import ranks as pool
from napo_loss import (
    MaskedLogps,
    Moments,
    NaPOLoss,
    Negative,
    Recipe,
    SequenceLogps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    reference,
)
from napo_loss.objective import ops
from napo_loss.objective.negatives import PreferenceBatch
from ranks import objective_is

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, interpreting
seeds = st.integers(0, 2**31)
RECIPES = [
    Recipe(),
    Recipe(weights="dynamic", q_from="all_pairs", sft_weight=0.3),
    Recipe(Negative(estimator="moment", margin="mean", alpha=0.5)),
    Recipe(Negative(estimator="paper"), average_logps=True, sft_weight=0.3, decay=0.5),
    Recipe(q_from="each_pair"),
    Recipe(Negative(q=0.0, weight=0.0), sft_weight=0.1),
]
GARBAGE = [math.nan, math.inf, -math.inf, 3e38, 0.0, -7.0]


def drawn(seed, K, B, dtype=torch.float32):
    """Chosen ``[B]`` and rejected ``[K, B]`` log-probs with lengths, references of the same shapes, a mask ``[B]``."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((B,), (K, B)) * 2
    logps = [(-60 * torch.rand(shape, generator=g)).to(dtype) for shape in shapes]
    lengths = [torch.randint(1, 20, shape, generator=g) for shape in shapes[:2]]
    return logps, lengths, torch.rand(B, generator=g) < 0.6


def with_garbage(x, mask, seed):
    """Anything at all where the mask is False."""
    g = torch.Generator().manual_seed(seed)
    other = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), x.shape, generator=g)]
    return torch.where(mask, x, other.to(x.dtype))


def run(logps, lengths, mask, recipe, previous=None, group=None):
    """The result, and the gradients of the policy's log-probs for a loss that weighs every chosen otherwise."""
    leaves = [x.clone().requires_grad_() for x in logps[:2]]
    chosen, rejected = (SequenceLogps(x, n) for x, n in zip(leaves, lengths, strict=True))
    chosen = chosen if mask is None else MaskedLogps(chosen, mask)
    out = napo_loss(chosen, rejected, *logps[2:], recipe=recipe, previous_moments=previous, process_group=group)
    (out.losses * torch.arange(1.0, 1 + len(out.losses))[: len(out.losses)]).sum().backward()
    return out, [x.grad for x in leaves]


def check_as_dropped(group, seed, K, counts, fused, number):
    """Of these ranks (or of this process) the one with masks and the one without these pairs find the same."""
    recipe, rank = RECIPES[number], group.rank() if group else 0
    logps, lengths, mask = drawn(seed + rank, K, counts[rank])
    each = recipe.q_from == "each_pair"
    if group is None and not mask.any():
        mask[0] = True  # without any pair the other would be an error
    dirty = [with_garbage(x, mask, seed) for x in logps]
    previous = None if each else torch.full((2, K), 4.0)
    with objective_is(fused and not each):
        out, grads = run(dirty, lengths, mask, recipe, previous, group)
        few = [[x[..., mask] for x in given] for given in (logps, lengths)]
        expected, _ = run(*few, None, recipe, previous, group)
        clean, clean_grads = run(logps, lengths, mask, recipe, previous, group)
    for name in ("losses", "chosen_rewards", "rejected_rewards", "q", "weights", "moments"):
        found, wanted = getattr(out, name), getattr(expected, name)
        assert torch.equal(found, getattr(clean, name)), name  # to the bit, whatever the masked pairs hold
        if name in ("losses", "chosen_rewards", "rejected_rewards"):
            assert (found[..., ~mask] == 0).all(), name
            found = found[..., mask]
        elif each and name in ("q", "moments"):
            found = found[..., mask]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for grad, other, shape in zip(grads, clean_grads, logps[:2], strict=True):
        assert torch.equal(grad, other)
        assert grad.shape == shape.shape
        assert (grad[..., ~mask] == 0).all()
        assert grad.isfinite().all()
    if group is None:
        weights = torch.arange(1.0, 1 + counts[0])[mask]
        leaves = [x.clone().requires_grad_() for x in few[0][:2]]
        pair = [SequenceLogps(x, n) for x, n in zip(leaves, few[1], strict=True)]
        with objective_is(fused and not each):
            again = napo_loss(*pair, *few[0][2:], recipe=recipe, previous_moments=previous)
        (again.losses * weights).sum().backward()
        for grad, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(grad[..., mask], leaf.grad, rtol=1e-5, atol=1e-6)
    return [out.q.mean() if each else out.q, out.weights]


@pytest.mark.parametrize("fused", [False, True])
@draws.examples(16)
@given(seeds, st.integers(1, 3), st.integers(1, 10), st.integers(0, len(RECIPES) - 1))
def test_a_masked_pair_is_as_one_that_was_dropped(fused, seed, K, B, number):
    check_as_dropped(None, seed, K, [B], fused, number)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_in_a_batch_of_several_tiles_of_the_kernel(number):
    check_as_dropped(None, 5, 3, [600], True, number)


@pytest.mark.parametrize("fused", draws.quick([False], [False, True]))
@pool.examples(8)
@given(seeds, st.integers(1, 3), st.lists(st.integers(0, 5), min_size=2, max_size=2), st.integers(0, len(RECIPES) - 1))
def test_on_two_ranks_too(ranks, fused, seed, K, counts, number):
    """Also where a rank has no pair, all of its pairs are masked, or no rank has one that counts."""
    found = ranks.run(2, check_as_dropped, seed, K, counts, fused, number)
    if RECIPES[number].q_from != "each_pair":
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("fused", [False, True])
@draws.examples(20)
@given(seeds, st.integers(1, 4), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_masks_of_single_pairs_against_float64(fused, seed, K, B, dtype):
    """A mask ``[K, B]`` beside negatives: each has the q of its own pairs, a chosen the losses of its own."""
    logps, _, _ = drawn(seed, K, B, dtype)
    mask = torch.rand(K, B, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    psi = ((logps[0] - 0.0).double() - logps[2].double())[None] - (logps[1].double() - logps[3].double())
    q = reference.noise_level(psi, pair_mask=mask)
    rows = [reference.noise_aware_dpo_loss(psi[k], 0.1, q[k].item(), mask[k]) for k in range(K)]
    dirty = [with_garbage(x, mask if x.dim() == 2 else mask.any(0), seed) for x in logps]
    leaves = [x.clone().requires_grad_() for x in dirty[:2]]
    with objective_is(fused and dtype != torch.float64):
        out = napo_loss(leaves[0], MaskedLogps(leaves[1], mask), *dirty[2:], recipe=Recipe(Negative(weight=0.5)))
    out.losses.sum().backward()
    torch.testing.assert_close(out.q.double(), q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.losses.double(), 0.5 * sum(rows), rtol=1e-5, atol=1e-5)
    assert (leaves[1].grad[~mask] == 0).all()
    assert (leaves[0].grad[~mask.any(0)] == 0).all()
    assert (leaves[1].grad[mask] > 0).all()


@draws.examples(40)
@given(seeds, st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_the_functions_of_margins_against_float64(seed, K, B, one_for_all):
    g = torch.Generator().manual_seed(seed)
    margin, mask = 100 * torch.randn(K, B, generator=g), torch.rand(B if one_for_all else (K, B), generator=g) < 0.5
    rows, dirty = mask.expand(K, B), with_garbage(margin, mask, seed)
    for estimator in ("released", "paper", "moment"):
        expected = reference.noise_level(margin.double(), 0.01, estimator, rows)
        found = noise_level(dirty, estimator=estimator, pair_mask=mask)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        row = reference.noise_level(margin[0].double(), 0.01, estimator, rows[0])
        assert torch.equal(row, expected[0])
    alone = margin_moments(dirty[0], pair_mask=rows[0])
    few = margin[0][rows[0]] if rows[0].any() else torch.zeros(1)
    torch.testing.assert_close(torch.stack(alone), torch.stack(margin_moments(few)), rtol=1e-5, atol=1e-4)
    each = margin_moments(dirty, q_from="each_pair", pair_mask=mask).mean
    assert torch.equal(each, torch.where(rows, margin, 0.0))

    leaves = torch.zeros(B, requires_grad=True), (-dirty).requires_grad_()
    out = noise_aware_dpo_loss(*leaves, None, None, q=0.5, pair_mask=mask)
    out.losses.sum().backward()
    expected = torch.stack([reference.noise_aware_dpo_loss(margin[k].double(), 0.1, 0.5, rows[k]) for k in range(K)])
    torch.testing.assert_close(out.losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert (out.rejected_rewards[~rows] == 0).all()
    assert (leaves[1].grad[~rows] == 0).all()
    assert leaves[0].grad.isfinite().all()


def check_margin_moments(group, q_from):
    margin = [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([6.0])][group.rank()]
    mask = [torch.tensor([True, False, True]), torch.tensor([True])][group.rank()]
    return margin_moments(margin, q_from=q_from, process_group=group, pair_mask=mask).mean.item()


def test_ranks_weigh_by_the_pairs_that_count(ranks):
    assert ranks.run(2, check_margin_moments, "rank_means") == [4.0, 4.0]
    assert ranks.run(2, check_margin_moments, "all_pairs") == [pytest.approx(10 / 3)] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_the_module_averages_over_pairs_that_count(fused):
    chosen, rejected = torch.tensor([-10.0, math.nan, -12.0]), torch.tensor([-30.0, 0.0, -11.0])
    mask = torch.tensor([True, False, True])
    loss_fn = NaPOLoss(recipe=Recipe(decay=0.5), reduction="mean")
    few = chosen[mask], rejected[mask], None, None
    with objective_is(fused):
        expected, moments = loss_fn(*few), loss_fn.previous_moments
        loss_fn.previous_moments = None
        found = loss_fn(MaskedLogps(chosen, mask), rejected, None, None)
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(loss_fn.previous_moments, moments)
        whole = loss_fn.eval().batch_moments(MaskedLogps(chosen, mask), rejected, None, None)
        torch.testing.assert_close(whole, loss_fn.batch_moments(*few))
        again = loss_fn(MaskedLogps(chosen, mask), rejected, None, None, whole)
        torch.testing.assert_close(again.losses, loss_fn(*few, whole).losses)
        nothing = loss_fn(MaskedLogps(chosen, torch.zeros(3, dtype=torch.bool)), rejected, None, None)
        assert [nothing.losses.item(), nothing.q.item()] == [0.0, 1.0]  # as at the start: nothing is known


@pytest.mark.parametrize("fused", [False, True])
def test_names_may_have_masks_of_their_own(fused):
    keep = torch.tensor([True, False])
    ours = {"a": torch.tensor([-20.0, -30.0]), "b": MaskedLogps(torch.tensor([-25.0, math.nan]), keep)}
    recipe = Recipe({"a": Negative(weight=0.25), "b": Negative(weight=0.75)})
    chosen = torch.tensor([-10.0, -11.0])
    with objective_is(fused):
        out = napo_loss(chosen, ours, None, None, recipe=recipe)
        first = napo_loss(chosen, ours["a"], None, None)
        second = napo_loss(chosen[:1], torch.tensor([-25.0]), None, None)
        theirs = {"a": torch.zeros(2), "b": MaskedLogps(torch.zeros(2), keep)}
        by_reference = napo_loss(chosen, ours | {"b": torch.tensor([-25.0, math.nan])}, torch.zeros(2), theirs)
    torch.testing.assert_close(out.q, torch.stack([first.q, second.q]))
    expected = 0.25 * first.losses + torch.cat([0.75 * second.losses, torch.zeros(1)])
    torch.testing.assert_close(out.losses, expected)
    assert by_reference.losses.isfinite().all()  # a pair counts that all masks count


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_as_one_graph(fused):
    def step(chosen, rejected, mask):
        out = napo_loss(MaskedLogps(chosen, mask), rejected, None, None, recipe=Recipe(weights="dynamic"))
        level = noise_level(chosen - rejected, pair_mask=mask)
        return out.losses.sum() / mask.sum(), out.q, level

    torch._dynamo.reset()
    chosen = torch.tensor([-10.0, math.nan, -12.0], requires_grad=True)
    rejected, mask = torch.tensor([[-30.0, math.inf, -11.0], [-12.0, 0.0, -9.0]]), torch.tensor([True, False, True])
    with objective_is(fused):
        expected = step(chosen, rejected, mask)
        (expected_grad,) = torch.autograd.grad(expected[0], chosen)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(chosen, rejected, mask)
        (grad,) = torch.autograd.grad(found[0], chosen)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad[1] == 0


def test_the_operators_know_of_masks():
    logps, _, mask = drawn(3, 2, 5)
    logps = [x.requires_grad_(i < 2) for i, x in enumerate(logps)]
    batch = PreferenceBatch.of(MaskedLogps(logps[0], mask), *logps[1:], Recipe())
    call = ops.ObjectiveCall.of(batch, 0.1, Recipe())
    again = ops.ObjectiveCall.from_schema(*call.to_schema().values())
    assert again.logps.pair_mask is batch.logps.pair_mask
    opcheck(ops.objective.definition, tuple(call.to_schema().values()))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3), TypeError, r"pair_mask.* must be a bool tensor, True for pairs that count, got torch.float32"),
        ([True] * 3, TypeError, r"pair_mask.* must be a bool tensor, True for pairs that count, got list"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"pair_mask.* must have shape \[3\], as .* asks, got \[2\]"),
        (torch.ones(3, dtype=torch.bool, device="meta"), ValueError, r"pair_mask.* is on meta, but .* is on cpu"),
    ],
)
def test_wrong_masks_are_named(mask, error, message):
    row = torch.zeros(3)
    for call in (
        lambda: napo_loss(MaskedLogps(row, mask), row, None, None),
        lambda: napo_loss(row, {"a": row, "b": MaskedLogps(row, mask)}, None, None),
        lambda: noise_level(row, pair_mask=mask),
        lambda: noise_aware_dpo_loss(row, row, None, None, q=0.0, pair_mask=mask),
    ):
        with pytest.raises(error, match=message):
            call()


def test_who_asks_for_an_argument_is_told_where_it_is():
    row, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"napo_loss takes pair_mask with the log-probs: MaskedLogps\(policy_chosen"):
        napo_loss(row, row, None, None, pair_mask=mask)
    with pytest.raises(ValueError, match="averaged already: give q_from, process_group and pair_mask to"):
        noise_level(Moments(row[0], row[0]), pair_mask=mask)
