"""q and weights of a whole batch for each of its micro-batches: however split, the numbers are those of one call."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napo_loss import NaPOLoss, Negative, Recipe, SequenceLogps, napo_loss
from napo_loss.objective.estimators import BatchMoments
from ranks import examples, objective_is

NAMES = ["rejected", "question_only", "image_only"]


def logps_of(seed, K, B, dtype=torch.float32):
    """Policy and reference log-probs of B chosen and K negatives of each (K = None: one, without its dimension)."""
    g = torch.Generator().manual_seed(seed)
    rows = (B,) if K is None else (K, B)

    def draw(*shape):
        return (30 * torch.randn(shape, generator=g)).to(dtype)

    lengths = [torch.randint(1, 9, shape, generator=g).to(dtype) for shape in ((B,), rows)]
    return [draw(B).requires_grad_(), draw(*rows).requires_grad_(), draw(B), draw(*rows)], lengths


def part(logps, lengths, here):
    """Those of some pairs."""
    chosen, rejected, *reference = (x[..., here] for x in logps)
    return [SequenceLogps(chosen, lengths[0][here]), SequenceLogps(rejected, lengths[1][..., here]), *reference]


def train(module, seeds, K, B, pieces, dtype=torch.float32):
    """Steps of batches of B pairs, each in these pieces: losses, q, weights and gradients of every step."""
    found = []
    for seed in seeds:
        logps, lengths = logps_of(seed, K, B, dtype)
        moments = module.batch_moments(*part([x.detach() for x in logps], lengths, slice(None)))
        outs = [module(*part(logps, lengths, slice(a, b)), moments) for a, b in pieces]
        losses = torch.cat([out.losses for out in outs])
        losses.mean().backward()
        for out in outs:
            assert torch.equal(out.q, outs[0].q)
            assert torch.equal(out.weights, outs[0].weights)
        found.append([losses, outs[0].q, outs[0].weights, logps[0].grad, logps[1].grad])
    return found


def pieces_of(B, cuts):
    edges = [0, *sorted({c for c in cuts if 0 < c < B}), B]
    return list(pairwise(edges))


@pytest.mark.parametrize("fused", [False, True])
@examples(40)
@given(
    seed=st.integers(0, 2**31), K=st.sampled_from([None, 1, 3]), B=st.integers(1, 9),
    cuts=st.lists(st.integers(1, 8), max_size=4), average=st.booleans(), dynamic=st.booleans(),
    sft=st.sampled_from([0.0, 0.3]), decay=st.sampled_from([0.0, 0.5]),
    estimator=st.sampled_from(["released", "paper", "moment"]),
)  # fmt: skip
def test_a_batch_in_pieces_is_the_batch(fused, seed, K, B, cuts, average, dynamic, sft, decay, estimator):
    negatives = {
        name: Negative(0.05, ("sum", "mean")[k % 2], (None, 0.4)[k == 2], 0.2 + 0.1 * k, estimator)
        for k, name in enumerate(NAMES[: K or 1])
    }
    recipe = Recipe(
        negatives, weights="dynamic" if dynamic else "fixed", average_logps=average, sft_weight=sft, decay=decay
    )
    seeds, pieces = [seed, seed + 1, seed + 2], pieces_of(B, cuts)
    exact = train(NaPOLoss(0.1, recipe), seeds, K, B, [(0, B)], torch.float64)
    with objective_is(fused):
        split = train(NaPOLoss(0.1, recipe), seeds, K, B, pieces)
    kept = None
    for step, (a, b) in enumerate(zip(exact, split, strict=True)):
        logps, lengths = logps_of(seeds[step], K, B, torch.float64)
        plain = napo_loss(*part(logps, lengths, slice(None)), recipe=recipe, previous_moments=kept)
        kept = plain.moments if decay else None
        plain.losses.mean().backward()  # one call without moments: what everything above must equal
        for x, y, z in zip(a, b, [plain.losses, plain.q, plain.weights, logps[0].grad, logps[1].grad], strict=True):
            torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-5)


def test_each_pair_keeps_its_q_and_shares_the_weights():
    recipe = Recipe({name: Negative(0.05) for name in NAMES}, weights="dynamic", q_from="each_pair")
    logps, lengths = logps_of(0, 3, 6)
    whole = napo_loss(*part(logps, lengths, slice(None)), recipe=recipe)
    module = NaPOLoss(0.1, recipe)
    moments = module.batch_moments(*part(logps, lengths, slice(None)))
    halves = [module(*part(logps, lengths, slice(a, a + 3)), moments) for a in (0, 3)]
    torch.testing.assert_close(torch.cat([x.q for x in halves], 1), whole.q)
    torch.testing.assert_close(torch.cat([x.losses for x in halves]), whole.losses)
    assert torch.equal(halves[0].weights, whole.weights)


def test_smoothed_once_in_training_and_not_in_evaluation():
    recipe = Recipe(Negative(0.05), decay=0.5)
    module = NaPOLoss(0.1, recipe)
    batches = [part(*logps_of(seed, None, 4), slice(None)) for seed in range(3)]
    first = module.batch_moments(*batches[0])
    second = module.batch_moments(*batches[1])
    alone = NaPOLoss(0.1, recipe).batch_moments(*batches[1])
    torch.testing.assert_close(second.mean, (first.mean + alone.mean) / 2)
    torch.testing.assert_close(second.margin, alone.margin)
    kept = module.previous_moments
    torch.testing.assert_close(kept, torch.stack(second[:2]))
    module(*batches[0], second)  # a micro-batch moves nothing
    assert module.previous_moments is kept
    module.eval()
    held = module.batch_moments(*batches[2])
    assert module.previous_moments is kept
    torch.testing.assert_close(held.mean, NaPOLoss(0.1, recipe).batch_moments(*batches[2]).mean)


def test_a_micro_batch_may_be_empty():
    module = NaPOLoss(0.1, Recipe(Negative(0.05)), reduction="mean")
    moments = module.batch_moments(*part(*logps_of(0, 2, 4), slice(None)))
    out = module(torch.zeros(0), torch.zeros(2, 0), None, None, moments)
    assert out.losses == 0
    assert torch.isfinite(out.q).all()


def test_other_moments_are_named():
    module = NaPOLoss(0.1, Recipe(Negative(0.05)))
    batch = part(*logps_of(0, 2, 4), slice(None))
    one = part(*logps_of(0, None, 4), slice(None))
    out = module(*batch)
    with pytest.raises(TypeError, match=r"moments must be what NaPOLoss\.batch_moments returned, got Tensor"):
        module(*batch, out.moments)
    with pytest.raises(ValueError, match=r"moments are of a batch with other negatives: expected \[3, 2\], got \[3\]"):
        module(*batch, module.batch_moments(*one))
    with pytest.raises(ValueError, match=r"expected \[3\], got \[3, 2\]"):
        module(*one, module.batch_moments(*batch))
    with pytest.raises(ValueError, match="policy_chosen_logps is empty"):
        module.batch_moments(torch.zeros(0), torch.zeros(2, 0), None, None)
    assert isinstance(module.batch_moments(*batch), BatchMoments)


def check_ranks(group, seed, counts, dynamic):
    recipe = Recipe({n: Negative(0.05) for n in NAMES}, weights="dynamic" if dynamic else "fixed", q_from="all_pairs")
    logps, lengths = logps_of(seed, 3, sum(counts))
    start = sum(counts[: group.rank()])
    here = slice(start, start + counts[group.rank()])
    module = NaPOLoss(0.1, recipe, group)
    moments = module.batch_moments(*part(logps, lengths, here))
    middle = (here.start + here.stop) // 2
    outs = [module(*part(logps, lengths, slice(a, b)), moments) for a, b in ((here.start, middle), (middle, here.stop))]
    whole = napo_loss(*part(logps, lengths, slice(None)), recipe=recipe)
    for out in outs:
        torch.testing.assert_close(out.q, whole.q)
        torch.testing.assert_close(out.weights, whole.weights)
    torch.testing.assert_close(torch.cat([out.losses for out in outs]), whole.losses[here])
    return moments


@pytest.mark.slow
@examples(15)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=2, max_size=3).filter(any), st.booleans())
def test_over_ranks_too(ranks, seed, counts, dynamic):
    first, *rest = ranks.run(len(counts), check_ranks, seed, counts, dynamic)
    for other in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
