"""Data and sequence parallel: the same q on every rank, the gradient of one process, errors instead of hangs."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import processes
import scale
from draws import quick
from napo_loss import (
    Negative,
    Recipe,
    SequenceLogps,
    all_reduce_logps,
    margin_moments,
    napo_loss,
    noise_aware_dpo_loss,
    noise_level,
    sequence_logps,
)
from ranks import Wire, examples, objective_is

seeds = st.integers(0, 2**31)
RECIPES = [
    Recipe(Negative(estimator=estimator), weights=weights, q_from=q_from)
    for estimator, weights in (("released", "fixed"), ("paper", "dynamic"), ("moment", "dynamic"))
    for q_from in ("rank_means", "all_pairs")
]


def margins_of(seed, K, counts):
    """Margins ``[K, B]`` for every rank: ragged, and some ranks without any."""
    g = torch.Generator().manual_seed(seed)
    return [100 * torch.randn(K, B, generator=g) for B in counts]


def expected_settings(margins, recipe):
    """Moments, q and weights, written out in float64."""
    margins = [m.double() for m in margins]
    if recipe.q_from == "all_pairs":
        mean, square = (torch.cat(margins, 1) ** power for power in (1, 2))
        mean, square = mean.mean(1), square.mean(1)
    else:
        mean, square = (torch.stack([(m**power).mean(1) for m in margins if m.shape[1]]).mean(0) for power in (1, 2))
    q = {
        "released": (2 * torch.sigmoid(-0.01 * mean)).clamp(0.001, 1),
        "paper": torch.sigmoid(-0.01 * 0.1 * mean).clamp(0.01, 1),
        "moment": (1 - mean / square.sqrt()).clamp(0.001, 1),
    }[recipe.negatives.estimator]
    gain = mean.clamp_min(0) + 0.05
    weights = (gain / gain.sum()).clamp_min(0.01) if recipe.weights == "dynamic" else torch.ones_like(mean)
    return torch.stack([mean, square]).float(), q.float(), weights.float()


def check_q(group, seed, K, counts, fused):
    margins = margins_of(seed, K, counts)
    mine = margins[group.rank()]
    zeros = torch.zeros(mine.shape[1])
    found = []
    with objective_is(fused):
        for recipe in RECIPES:
            moments, q, weights = expected_settings(margins, recipe)
            out = napo_loss(zeros, -mine, None, None, recipe=recipe, process_group=group)
            torch.testing.assert_close(out.q, q, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.weights, weights, rtol=1e-4, atol=1e-5)
            assert out.losses.shape == zeros.shape
            assert torch.isfinite(out.losses).all()
            torch.testing.assert_close(out.moments, moments, rtol=1e-4, atol=1e-4)
            alone = margin_moments(mine, q_from=recipe.q_from, process_group=group)
            torch.testing.assert_close(torch.stack(alone), moments, rtol=1e-4, atol=1e-4)
            estimator = recipe.negatives.estimator
            seen = 0.1 * mine if estimator == "paper" else mine  # β is inside the margin that the paper's q reads
            level = noise_level(seen, estimator=estimator, q_from=recipe.q_from, process_group=group)
            torch.testing.assert_close(level, q, rtol=1e-4, atol=1e-5)
            found += [out.q, out.weights, out.moments, level]
    return found


@pytest.mark.parametrize("fused", [False, True])
@examples(30)
@given(seeds, st.integers(1, 3), st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any))
def test_q_and_weights_are_global(ranks, fused, seed, K, counts):
    results = ranks.run(len(counts), check_q, seed, K, counts, fused)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)  # to the bit, or ranks would drift apart


def check_no_pair_anywhere(group):
    out = napo_loss(torch.zeros(0), torch.zeros(2, 0), None, None, process_group=group)
    assert out.losses.shape == (0,)
    assert (out.moments == 0).all()
    assert (out.q == 1).all()  # as at the start: no evidence of a margin, and no NaN to smooth the next q with


def test_a_step_without_pairs_on_any_rank(ranks):
    ranks.run(2, check_no_pair_anywhere)


def check_collectives(group):
    """One all-reduce for all negatives, one each way for sequences, none that nobody asked for; of the sizes stated."""
    ours = {name: torch.zeros(2) for name in ("rejected", "question_only", "image_only")}
    lengths = {name: SequenceLogps(x, torch.ones(2)) for name, x in ours.items()}
    chosen = SequenceLogps(torch.zeros(2, requires_grad=True), torch.ones(2))
    with Wire() as wire:
        out = napo_loss(chosen, lengths, None, None, recipe=Recipe(weights="dynamic"), process_group=group)
        out.losses.sum().backward()
    assert (wire.get_total_counts(), wire.bytes) == (1, scale.global_means(K=3))
    with Wire() as wire:
        all_reduce_logps(chosen, group).sum.sum().backward()
    assert (wire.get_total_counts(), wire.bytes) == (2, 2 * scale.sequence(N=2))
    with Wire() as wire:
        napo_loss(chosen, lengths, None, None)
        noise_level(torch.zeros(2))
        all_reduce_logps(chosen, None)
    assert wire.get_total_counts() == 0


def test_collectives_are_those_stated(ranks):
    ranks.run(2, check_collectives)


def model_and_data(counts):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 11)
    hidden = [torch.randn(2 * B, 3, 6) for B in counts]
    labels = [torch.randint(0, 11, (2 * B, 3)) for B in counts]
    return model, hidden, labels


def check_ragged(group, counts, fused):
    """The recipe for ragged ranks in docs/parallel.md: DDP averages over ranks, so each scales by ranks/pairs."""
    model, hidden, labels = model_and_data(counts)
    rank, B = group.rank(), counts[group.rank()]
    wrapped = DistributedDataParallel(model, process_group=group)
    # A rank without pairs computes a dummy, so that DDP's hooks fire, and hands over none of it.
    x, y = (hidden[rank], labels[rank]) if B else (torch.zeros(2, 3, 6), torch.zeros(2, 3, dtype=torch.long))
    chosen, rejected = (p.sum[:B] for p in sequence_logps(wrapped(x), y).pairs())
    recipe = Recipe(q_from="all_pairs")
    with objective_is(fused):
        out = napo_loss(chosen, rejected, None, None, beta=1.0, recipe=recipe, process_group=group)
    pairs = torch.tensor(float(B))
    dist.all_reduce(pairs, group=group)
    (out.losses.sum() * group.size() / pairs).backward()

    single, hidden, labels = model_and_data(counts)
    split = [sequence_logps(single(h), y).pairs() for h, y in zip(hidden, labels, strict=True) if len(y)]
    chosen, rejected = (torch.cat([p[i].sum for p in split]) for i in (0, 1))
    expected = napo_loss(chosen, rejected, None, None, beta=1.0)
    expected.losses.mean().backward()
    torch.testing.assert_close(out.q, expected.q)
    torch.testing.assert_close(wrapped.module.weight.grad, single.weight.grad)
    torch.testing.assert_close(wrapped.module.bias.grad, single.bias.grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (1, 0, 2, 4)])
def test_ragged_and_empty_ranks_give_the_gradient_of_one_process(ranks, counts, fused):
    ranks.run(len(counts), check_ragged, counts, fused)


def check_accumulation(group):
    """q of the whole accumulated, global batch, then micro-batches: the same as one process with one batch."""
    model, hidden, labels = model_and_data([4] * group.size())
    micro = list(zip(hidden[group.rank()].view(4, 2, 3, 6), labels[group.rank()].view(4, 2, 3), strict=True))
    with torch.no_grad():  # first pass: only the margins
        pairs = [sequence_logps(model(h), y).pairs() for h, y in micro]
        q = noise_level(torch.cat([c.sum - r.sum for c, r in pairs]), process_group=group)
    for h, y in micro:  # second pass: the gradient, one pair at a time
        chosen, rejected = sequence_logps(model(h), y).pairs()
        losses = noise_aware_dpo_loss(chosen.sum, rejected.sum, None, None, q=q).losses
        (losses.mean() / len(micro)).backward()
    dist.all_reduce(model.weight.grad, group=group)

    single, hidden, labels = model_and_data([4] * group.size())
    split = [
        sequence_logps(single(h), y).pairs()
        for hs, ys in zip(hidden, labels, strict=True)
        for h, y in zip(hs.view(4, 2, 3, 6), ys.view(4, 2, 3), strict=True)
    ]
    chosen, rejected = (torch.cat([p[i].sum for p in split]) for i in (0, 1))
    expected = napo_loss(chosen, rejected, None, None)
    expected.losses.mean().backward()
    torch.testing.assert_close(q, expected.q)
    torch.testing.assert_close(model.weight.grad / group.size(), single.weight.grad)


@pytest.mark.parametrize("W", [2, 4])
def test_accumulation_over_ranks(ranks, W):
    ranks.run(W, check_accumulation)


def check_sequence_parallel(group, seed, N, T, zigzag):
    """Positions over ranks, under DDP: whole sequences' log-probs and, averaged, the gradient of one process."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 13)
    single = torch.nn.Linear(5, 13)
    single.load_state_dict(model.state_dict())
    hidden = torch.randn(2 * N, T, 5, generator=g)
    labels = torch.randint(0, 13, (2 * N, T), generator=g).masked_fill(torch.rand(2 * N, T, generator=g) < 0.3, -100)
    expected = sequence_logps(single(hidden), labels)
    loss = napo_loss(*expected.pairs(), None, None, beta=1.0)
    loss.losses.mean().backward()

    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # before the split
    at = torch.arange(T)[group.rank() :: group.size()]
    if not zigzag:
        at = torch.arange(T).tensor_split(group.size())[group.rank()]
    if len(at) == 0:  # more ranks than positions
        at, shifted = torch.zeros(1, dtype=torch.long), torch.full_like(shifted, -100)
    wrapped = DistributedDataParallel(model, process_group=group)
    local = sequence_logps(wrapped(hidden[:, at]), shifted[:, at].contiguous(), shift=False)
    whole = all_reduce_logps(local, group)
    torch.testing.assert_close(whole, expected)
    out = napo_loss(*whole.pairs(), None, None, beta=1.0, process_group=group)  # equal ranks: the mean is the same
    torch.testing.assert_close(out.q, loss.q)
    out.losses.mean().backward()
    torch.testing.assert_close(wrapped.module.weight.grad, single.weight.grad, rtol=1e-4, atol=1e-6)
    return whole.sum.detach()


@examples(15)
@given(seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_sequence_parallel(ranks, seed, W, N, T, zigzag):
    sums = ranks.run(W, check_sequence_parallel, seed, N, T, zigzag)
    assert all(torch.equal(sums[0], other) for other in sums)


def check_packed(group):
    """Two packed sequences cut in two in the middle of the second: the first is empty on the last rank."""
    logits, labels = torch.randn(10, 7, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 7
    cu = torch.tensor([0, 4, 10])
    expected = sequence_logps(logits, labels, cu_seqlens=cu)
    shifted = torch.cat([labels[1:4], torch.tensor([-100]), labels[5:10], torch.tensor([-100])])
    mine = slice(5 * group.rank(), 5 * group.rank() + 5)
    cu = torch.tensor([[0, 4, 5], [0, 0, 5]][group.rank()])
    local = sequence_logps(logits[mine], shifted[mine], cu_seqlens=cu, shift=False)
    torch.testing.assert_close(all_reduce_logps(local, group), expected)


def test_sequence_parallel_packed(ranks):
    ranks.run(2, check_packed)


def check_gradient(group):
    """The all-reduce is its own adjoint: sum over ranks of what each asks for, in float64 by finite differences too."""
    x = torch.arange(3.0, dtype=torch.float64) + group.rank()
    x.requires_grad_()
    out = all_reduce_logps(SequenceLogps(x, torch.ones(3)), group)
    assert out.sum.dtype == torch.float64
    assert not out.length.requires_grad
    (out.sum * (1 + group.rank())).sum().backward()
    assert (x.grad == sum(range(1, group.size() + 1))).all()
    # Σ_ranks s³ with s the sum: 3·W·s² and, of that, W·Σ_ranks 6·W·s.
    s, W = all_reduce_logps(SequenceLogps(x, torch.ones(3)), group).sum, group.size()
    (first,) = torch.autograd.grad((s**3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * W * s**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * W**2 * s)


def test_the_gradient_is_the_sum_over_ranks(ranks):
    ranks.run(3, check_gradient)


def check_not_in_group(group, path):
    """``new_group`` gives outsiders a placeholder, with which PyTorch's collectives warn and return."""
    pair = dist.new_group([0, 1])
    if group.rank() < 2:
        assert noise_level(torch.zeros(2), process_group=pair) == 1
        return
    for call in (
        lambda: noise_level(torch.zeros(2), process_group=pair),
        lambda: napo_loss(torch.zeros(2), torch.zeros(2), None, None, process_group=pair),
        lambda: all_reduce_logps(SequenceLogps(torch.zeros(2), torch.ones(2)), pair),
    ):
        with pytest.raises(ValueError, match=rf"process_group is .* \(rank {group.rank()}\) is not in"):
            call()


def test_a_process_outside_the_group_is_told_so(ranks, tmp_path):
    ranks.run(4, check_not_in_group, str(tmp_path))


def test_what_is_no_process_group_is_named():
    for call in (
        lambda: noise_level(torch.zeros(2), process_group="dp"),
        lambda: napo_loss(torch.zeros(2), torch.zeros(2), None, None, process_group=0),
    ):
        with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup or None, got"):
            call()
    with pytest.raises(TypeError, match="logps must be a SequenceLogps, got Tensor"):
        all_reduce_logps(torch.zeros(2), None)
    with pytest.raises(ValueError, match="which only a rank of a process_group may do"):
        napo_loss(torch.zeros(0), torch.zeros(0), None, None)
    with pytest.raises(ValueError, match="margin must be a non-empty"):
        noise_level(torch.zeros(2, 0))


def fails(rank, folder, how):
    """Rank 1 dies, or comes with another number of negatives: at least one rank must end with an error, at once."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    dist.barrier()
    Path(folder, f"{rank} was there").touch()
    if how == "dies" and rank == 1:
        os._exit(0)
    K = 1 + rank if how == "another K" else 2
    noise_level(torch.zeros(K, 3), process_group=dist.group.WORLD)
    Path(folder, f"{rank} noticed nothing").touch()


@pytest.mark.parametrize("how", quick(["another K"], ["dies", "another K"]))
def test_a_rank_that_dies_or_disagrees_is_an_error_and_no_hang(how, tmp_path):
    with pytest.raises((torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException)):
        torch.multiprocessing.spawn(fails, (str(tmp_path), how), nprocs=2)
    seen = {path.name for path in tmp_path.iterdir()}
    assert {"0 was there", "1 was there"} <= seen  # it was the all-reduce that failed
    assert not {"0 noticed nothing", "1 noticed nothing"} <= seen


@pytest.mark.slow
def test_the_example_is_the_same_on_every_grid():
    def run(count, tp):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launch, "examples/parallel.py", "--steps", "3", "--tp", str(tp)]
        done = processes.run(command)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    one = run(1, 1)
    assert one.count("loss") == 2
    assert run(4, 2) == one
