"""A vocabulary split over ranks gives what the whole one gives, and exchanges no more than it says."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.library import opcheck

import scale
from napo_loss import (
    LowRank,
    VocabShard,
    linear_sequence_logps,
    reference,
    sequence_logps,
)
from napo_loss.logps import factored, memory, sharded
from napo_loss.logps.calls import ShardedCall
from napo_loss.parallel import shards
from napo_loss.parallel.columns import Columns
from ranks import Wire, examples

BACKENDS = ["eager", "triton"]
seeds = st.integers(0, 2**31)
NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B")
SPLIT = ("weight", "bias", "lora_B")
LORA = ("hidden", "lora_A", "lora_B")


def bounds(V, W, kind, g):
    """Where the shards begin and end: equal (the last one padded), as DTensor splits, or anywhere."""
    if kind == "anywhere":
        cuts = torch.randint(0, V + 1, (W - 1,), generator=g).sort().values.tolist()
    else:
        cuts = [min(V, rank * -(-V // W)) for rank in range(1, W)]
    return [0, *cuts, V]


def shard_of(x, dim, cuts, group, kind):
    """This rank's part of ``x`` along ``dim``, padded with garbage where shards must be equal."""
    rank, V = group.rank(), cuts[-1]
    local = x.narrow(dim, cuts[rank], cuts[rank + 1] - cuts[rank])
    missing = -(-V // group.size()) - local.shape[dim] if kind == "padded" else 0
    if missing > 0:
        shape = list(x.shape)
        shape[dim] = missing
        local = torch.cat([local, torch.full(shape, 1e4, dtype=x.dtype)], dim)
    return local.detach().clone()


def described(local, cuts, group, kind):
    given = {"V": cuts[-1]} if kind == "padded" else {"start": cuts[group.rank()], "V": cuts[-1]}
    return VocabShard(local, group, **given)


def example(seed, N, T, V, masked=0.4):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N, T), generator=g).masked_fill(torch.rand(N, T, generator=g) < masked, -100)
    return g, labels, torch.rand(N, T, generator=g), torch.randn(N, generator=g)


def assert_no_worse(ours, plain, exact, eps, scale, what):
    """The house rule: the error against float64 is at most that of the same-dtype computation, and a small eps."""
    error, allowed = (ours.double() - exact).norm(), (plain.double() - exact).norm()
    assert error <= 2 * allowed + eps * (exact.norm() + scale), (what, error, allowed)


def check_logits(group, seed, N, T, V, kind, dtype, backend, weighted, shift, packed):
    g, labels, weights, upstream = example(seed, N, T, V)
    logits = (3 * torch.randn(N, T, V, generator=g)).to(dtype)
    cuts = bounds(V, group.size(), kind, g)
    given = {"shift": shift} | ({"token_weights": weights} if weighted else {})
    results = []
    for whole in (logits.double().requires_grad_(), logits.detach().clone().requires_grad_()):
        cast = {k: x.to(whole.dtype) if k == "token_weights" else x for k, x in given.items()}
        out = reference.sequence_logps(whole, labels, **cast)
        out.sum.backward(upstream.to(out.sum.dtype))
        results.append((out, whole.grad))
    local = shard_of(logits, 2, cuts, group, kind).requires_grad_()
    shard = described(local, cuts, group, kind)
    if packed:
        cu = torch.arange(N + 1) * T
        flat = {k: x.flatten() if k == "token_weights" else x for k, x in given.items()}
        shard = shard._replace(local=local.flatten(0, 1))
        ours = sequence_logps(shard, labels.flatten(), cu_seqlens=cu, backend=backend, **flat)
    else:
        ours = sequence_logps(shard, labels, backend=backend, **given)
    ours.sum.backward(upstream)
    eps = 1e-5 if dtype == torch.float32 else 0.02
    (exact, exact_grad), (plain, plain_grad) = results
    assert_no_worse(ours.sum.detach(), plain.sum.detach(), exact.sum.detach(), 1e-5, 1, "sum")
    torch.testing.assert_close(ours.length.double(), exact.length)
    mine = slice(cuts[group.rank()], cuts[group.rank() + 1])
    size = mine.stop - mine.start
    assert_no_worse(local.grad[..., :size], plain_grad[..., mine], exact_grad[..., mine], eps, 0.01, "gradient")
    assert (local.grad[..., size:] == 0).all()
    assert local.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@examples(40)
@given(
    seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 5, 16, 37, 301, 5003]),
    st.sampled_from(["dtensor", "padded", "anywhere"]), st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_logits(ranks, backend, seed, W, N, T, V, kind, dtype, weighted, shift, packed):
    ranks.run(W, check_logits, seed, N, T, V, kind, dtype, backend, weighted, shift, packed)


def linear_tensors(g, N, T, D, V, r, dtype):
    shapes = {"hidden": (N, T, D), "weight": (V, D), "bias": (V,), "lora_A": (r, D), "lora_B": (V, r)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def run_linear(function, tensors, labels, upstream, wrap, *, low_rank, trained, **kwargs):
    leaves = {n: x.detach().clone().requires_grad_(n in trained) for n, x in tensors.items()}
    head = LowRank(leaves["weight"], leaves["lora_A"], leaves["lora_B"], 0.5) if low_rank else leaves["weight"]
    out = function(leaves["hidden"], wrap(head), labels, bias=leaves["bias"], **kwargs)
    out.sum.backward(upstream.to(out.sum.dtype))
    return out, {n: leaves[n].grad for n in NAMES if leaves[n].grad is not None}


def check_linear(group, seed, sizes, kind, dtype, backend, low_rank, trained, budget, head):
    N, T, D, V = sizes
    g, labels, _, upstream = example(seed, N, T, V)
    tensors = linear_tensors(g, N, T, D, V, 2, dtype)
    cuts = bounds(V, group.size(), kind, g)
    options = {"low_rank": low_rank, "trained": trained, **head}
    wide = {n: x.double() for n, x in tensors.items()}
    exact, exact_grads = run_linear(reference.linear_sequence_logps, wide, labels, upstream, lambda w: w, **options)
    plain, plain_grads = run_linear(
        linear_sequence_logps, tensors, labels, upstream, lambda w: w, backend=backend, logits_budget=budget, **options
    )
    local = {n: shard_of(x, 0, cuts, group, kind) if n in SPLIT else x for n, x in tensors.items()}
    ours, grads = run_linear(
        linear_sequence_logps, local, labels, upstream, lambda w: described(w, cuts, group, kind), backend=backend,
        logits_budget=budget, **options,
    )  # fmt: skip
    eps = 1e-5 if dtype == torch.float32 else 0.02
    assert_no_worse(ours.sum.detach(), plain.sum.detach(), exact.sum.detach(), 1e-5, 1, "sum")
    torch.testing.assert_close(ours.length.double(), exact.length)
    mine = slice(cuts[group.rank()], cuts[group.rank() + 1])
    size = mine.stop - mine.start
    for name, grad in exact_grads.items():
        split = name in SPLIT
        found = grads.get(name)
        whole = grad[mine] if split else grad
        also = plain_grads[name][mine] if split else plain_grads[name]
        assert_no_worse(found[:size] if split else found, also, whole, eps, upstream.norm() * 0.01, name)
        if split:
            assert (found[size:] == 0).all()
        assert found.dtype == dtype
    return [grads[n] for n in ("hidden", "lora_A") if n in grads]


@pytest.mark.parametrize("backend", BACKENDS)
@examples(40)
@given(
    seeds, st.integers(2, 4), st.integers(1, 3), st.integers(2, 6), st.sampled_from([1, 5, 37, 1000]),
    st.sampled_from(["dtensor", "padded", "anywhere"]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
    st.sampled_from([NAMES, ("hidden",), ("weight",), LORA]), st.sampled_from([1, 999, 2**28]),
    st.sampled_from([None, 4.0]), st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_linear(ranks, backend, seed, W, N, T, V, kind, dtype, low_rank, trained, budget, softcap, scale):
    if not low_rank and trained == LORA:
        trained = ("hidden",)
    head = {"softcap": softcap, "logit_scale": scale}
    args = seed, (N, T, 8, V), kind, dtype, backend, low_rank, trained, budget, head
    shared = ranks.run(W, check_linear, *args)
    for other in shared[1:]:  # what every rank holds whole gets the same gradient everywhere, to the bit
        for a, b in zip(shared[0], other, strict=True):
            assert torch.equal(a, b)


def check_dtensor(group, V):
    """As a tensor-parallel model hands it over: DTensors in, plain numbers out, DTensor gradients."""
    g, labels, _, upstream = example(0, 2, 6, V, masked=0.3)
    tensors = linear_tensors(g, 2, 6, 8, V, 2, torch.float32)
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    whole = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    head = LowRank(whole["weight"], whole["lora_A"], whole["lora_B"], 0.5)
    expected = linear_sequence_logps(whole["hidden"], head, labels, bias=whole["bias"])
    expected.sum.backward(upstream)
    for placement in (Replicate(), Shard(1)):  # Shard(1): Megatron's sequence parallelism before the head
        split = {n: distribute_tensor(tensors[n], mesh, [Shard(0)]).requires_grad_() for n in SPLIT}
        hidden = distribute_tensor(tensors["hidden"], mesh, [placement]).requires_grad_()
        lora_A = distribute_tensor(tensors["lora_A"], mesh, [Replicate()]).requires_grad_()
        head = LowRank(split["weight"], lora_A, split["lora_B"], 0.5)
        out = linear_sequence_logps(hidden, head, labels, bias=split["bias"])
        out.sum.backward(upstream)
        assert not isinstance(out.sum, DTensor)
        torch.testing.assert_close(out, expected)
        for name, x in {**split, "hidden": hidden, "lora_A": lora_A}.items():
            assert x.grad.placements == x.placements
            torch.testing.assert_close(x.grad.full_tensor(), whole[name].grad, rtol=1e-5, atol=1e-5, msg=name)
    logits = torch.randn(2, 6, V, generator=g)
    whole = logits.clone().requires_grad_()
    expected = sequence_logps(whole, labels)
    expected.sum.backward(upstream)
    split = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
    out = sequence_logps(split, labels)
    out.sum.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(split.grad.full_tensor(), whole.grad, rtol=1e-5, atol=1e-6)
    replicated = distribute_tensor(logits, mesh, [Replicate()])
    torch.testing.assert_close(sequence_logps(replicated, labels), expected)


@pytest.mark.parametrize(("W", "V"), [(2, 37), (4, 37), (4, 5)])  # 5 over 4: the last rank has nothing
def test_dtensors(ranks, W, V):
    ranks.run(W, check_dtensor, V)


def check_two_dimensions(group):
    """Data and tensor parallel: each row of the mesh has sequences of its own, each column columns of its own."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = mesh.get_local_rank("dp")
    labels = example(1, 4, 5, 10)[1]
    logits = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(2))
    expected = sequence_logps(logits, labels).sum[2 * row : 2 * row + 2]
    split = distribute_tensor(logits, mesh, [Shard(0), Shard(2)])
    torch.testing.assert_close(sequence_logps(split, labels[2 * row : 2 * row + 2]).sum, expected)
    weight = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0), Shard(0)])
    hidden = distribute_tensor(torch.zeros(2, 5, 4), mesh, [Replicate(), Replicate()])
    with pytest.raises(TypeError, match=r"weight must have placement Shard\(dim=0\).*redistribute"):
        linear_sequence_logps(hidden, weight, labels[:2])
    weight = distribute_tensor(torch.zeros(8, 4), mesh, [Replicate(), Shard(0)])
    hidden = distribute_tensor(torch.zeros(4, 5, 4), mesh, [Shard(0), Replicate()])
    with pytest.raises(TypeError, match="hidden must be replicated wherever weight is"):
        linear_sequence_logps(hidden, weight, labels[:2])
    split = distribute_tensor(logits, mesh, [Replicate(), Shard(1)])
    with pytest.raises(TypeError, match=r"logits must have placement Shard\(dim=2\).*or Shard\(dim=0\) on others"):
        sequence_logps(split, labels)


def test_data_and_tensor_parallel(ranks):
    ranks.run(4, check_two_dimensions)


def check_exchange(group, budget):
    """Three floats per active position forward, one sum of the active rows of dhidden backward; whatever V."""
    g, labels, _, upstream = example(3, 4, 9, 60)
    tensors = linear_tensors(g, 4, 9, 8, 60, 2, torch.bfloat16)
    A = int((labels[:, 1:] != -100).sum())
    counted = {}

    def watched(name, original):
        # An operator hides from dispatch modes what it does, so the mode is entered inside.
        def call(*args):
            with Wire() as wire:
                out = original(*args)
            counted[name] = wire.get_total_counts(), wire.bytes
            return out

        return call

    forward, backward, merge = factored.forward, factored.backward, sharded.merge
    factored.forward, factored.backward = watched("forward", forward), watched("backward", backward)
    sharded.merge = watched("logits", merge)
    cuts = bounds(60, group.size(), "dtensor", g)
    try:
        weight = shard_of(tensors["weight"], 0, cuts, group, "dtensor").requires_grad_()
        shard = described(weight, cuts, group, "dtensor")
        hidden = tensors["hidden"].requires_grad_()
        linear_sequence_logps(hidden, shard, labels, logits_budget=budget).sum.backward(upstream)
        local = torch.randn(4, 9, cuts[1]).requires_grad_()
        sequence_logps(described(local, cuts, group, "dtensor"), labels).sum.backward(upstream)
    finally:
        factored.forward, factored.backward, sharded.merge = forward, backward, merge
    per_row = -(-60 // group.size()) * (4 + 2)  # float32 logits and their bfloat16 dlogits
    chunks = -(-A // max(1, budget // per_row))
    assert counted["forward"] == (2 * chunks, scale.vocabulary_forward(A, chunks))
    assert counted["backward"] == (1, scale.vocabulary_backward(A, D=8))
    assert counted["logits"] == (2, scale.vocabulary_forward(A))


@pytest.mark.parametrize("budget", [500, 2**28])
@pytest.mark.parametrize("W", [2, 4])
def test_what_is_exchanged(ranks, W, budget):
    ranks.run(W, check_exchange, budget)


def check_labels_that_look_masked(group):
    """-100 columns before a shard's first one is a label like any other, though relative to the shard it is -100."""
    V, start = 600, 300 * group.rank()
    logits, labels = (
        torch.randn(1, 5, V, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 200, 100, 500, 0]]),
    )
    weight = torch.randn(V, 3, generator=torch.Generator().manual_seed(1))
    for backend in BACKENDS:
        local = VocabShard(logits[..., start : start + 300], group, V)
        torch.testing.assert_close(sequence_logps(local, labels, backend=backend), sequence_logps(logits, labels))
        local, hidden = VocabShard(weight[start : start + 300], group, V), torch.ones(1, 5, 3)
        expected = linear_sequence_logps(hidden, weight, labels)
        torch.testing.assert_close(linear_sequence_logps(hidden, local, labels, backend=backend), expected)


def test_labels_that_look_masked_from_another_shard(ranks):
    ranks.run(2, check_labels_that_look_masked)


def check_wrong_shards(group):
    labels = torch.tensor([[-100, 3, 1]])
    rank, mesh = group.rank(), dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    # Shards of 4 and 3 columns: wherever else they are said to start there is a gap or an overlap.
    uneven = VocabShard(torch.randn(1, 3, 4 - rank), group, V=7, start=4 * rank)
    assert torch.isfinite(sequence_logps(uneven, labels).sum).all()
    for wrong in ({"start": None}, {"start": 0}, {"start": 3 * rank}, {"V": 8}):
        assert torch.isnan(sequence_logps(uneven._replace(**wrong), labels).sum).all(), wrong
    # In several chunks, too: all ranks form the same ones.
    many, few = torch.randint(0, 7, (2, 40)), VocabShard(torch.randn(4 - rank, 2), group, V=7)
    assert torch.isnan(linear_sequence_logps(torch.randn(2, 40, 2), few, many, logits_budget=160).sum).all()
    for call in (
        partial(sequence_logps, uneven),
        partial(linear_sequence_logps, torch.randn(1, 3, 2), VocabShard(torch.randn(4, 2), group, V=7)),
    ):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
            call(labels + 4)
    outside = labels + torch.tensor([[0, 4, 0]])  # what a GPU does with a label outside: NaN
    assert torch.isnan(sequence_logps(uneven, outside, backend="triton").sum).all()
    rows = VocabShard(torch.randn(4 - rank, 2), group, V=7, start=4 * rank)
    assert torch.isnan(linear_sequence_logps(torch.randn(1, 3, 2), rows, outside, backend="triton").sum).all()
    for wrong, message in (
        ({"start": -1}, r"logits\.start must be >= 0, got -1"),
        ({"V": 0}, r"logits\.V must be the size of the whole vocabulary, got 0"),
        ({"V": None}, r"logits\.V must be the size of the whole vocabulary, got None"),
        ({"process_group": -100}, r"logits\.process_group is a process group that this process .* is not"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_logps(uneven._replace(**wrong), labels)
    hidden = torch.zeros(1, 3, 2)
    with pytest.raises(TypeError, match=r"weight\.local must be the columns .* got list"):
        linear_sequence_logps(hidden, VocabShard([1.0], group, V=7), labels)
    with pytest.raises(ValueError, match=rf"bias must have the {4 - rank} rows of weight\.local.* got 7"):
        linear_sequence_logps(hidden, rows, labels, bias=torch.zeros(7))
    low_rank = LowRank(rows.local, torch.zeros(1, 2), torch.zeros(7, 1))
    with pytest.raises(ValueError, match=rf"lora_B must have the {4 - rank} rows of weight\.local.* got 7"):
        linear_sequence_logps(hidden, rows._replace(local=low_rank), labels)

    split, whole = (distribute_tensor(torch.zeros(8, 2), mesh, [place]) for place in (Shard(0), Replicate()))
    with pytest.raises(TypeError, match=r"weight is a DTensor and hidden is not.*fused_head"):
        linear_sequence_logps(hidden, split, labels)
    replicated = distribute_tensor(hidden, mesh, [Replicate()])
    with pytest.raises(TypeError, match="bias must be a DTensor placed like weight"):
        linear_sequence_logps(replicated, split, labels, bias=torch.zeros(8))
    with pytest.raises(TypeError, match="hidden is a DTensor and weight is not"):
        linear_sequence_logps(replicated, torch.zeros(8, 2), labels)
    with pytest.raises(TypeError, match="labels must be a plain tensor"):
        linear_sequence_logps(replicated, split, distribute_tensor(labels, mesh, [Replicate()]))
    for place in (Shard(0), Partial()):  # each rank's part of dweight would pass for all of it
        batch = DTensor.from_local(hidden, mesh, [place], run_check=False)
        with pytest.raises(TypeError, match="hidden must be replicated wherever weight is"):
            linear_sequence_logps(batch, whole, labels)


def test_wrong_shards_are_an_error_or_a_nan(ranks):
    ranks.run(2, check_wrong_shards)


def check_minus_infinity(group):
    """A mask may cover all the columns of a rank, the label's among them: then its log-prob is -inf, and no NaN."""
    logits, labels = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[-100, 1, 6, 5]])
    logits[0, 0, :4] = -torch.inf
    expected = sequence_logps(logits, labels)
    assert expected.sum.isneginf().all()
    for backend in BACKENDS:
        half = logits[..., 4 * group.rank() : 4 * group.rank() + 4]
        torch.testing.assert_close(sequence_logps(VocabShard(half, group, V=8), labels, backend=backend), expected)


def test_a_shard_of_minus_infinity(ranks):
    ranks.run(2, check_minus_infinity)


def check_free_memory(group):
    """Ranks with more or less free memory form the same chunks, so that they exchange the same."""
    original, memory.os.sysconf = memory.os.sysconf, lambda name: 8 * (1 + 3 * group.rank())
    try:
        g, labels, _, _ = example(4, 2, 20, 8)
        tensors = linear_tensors(g, 2, 20, 4, 8, 1, torch.float32)
        local = tensors["weight"][4 * group.rank() : 4 * group.rank() + 4]
        split = linear_sequence_logps(tensors["hidden"], VocabShard(local, group, V=8), labels)
    finally:
        memory.os.sysconf = original
    torch.testing.assert_close(split, linear_sequence_logps(tensors["hidden"], tensors["weight"], labels))


def test_free_memory_may_differ_between_ranks(ranks):
    ranks.run(2, check_free_memory)


def check_operators(group, backend):
    columns = Columns(4 * group.rank(), 4, 8, 4, group.group_name)
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[7, -100, 1], [0, 4, -100]])
    opcheck(sharded.sharded_logps.definition, (), ShardedCall(logits, targets, columns, backend=backend).to_schema())
    # A function of the shard compiles as one graph; a process group is not a tensor, so it comes from outside.
    shard = VocabShard(torch.randn(4, 5, requires_grad=True), group, V=8)
    hidden, labels = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[-100, 7, 1], [-100, 4, -100]])

    def step(hidden, weight):
        return linear_sequence_logps(hidden, shard._replace(local=weight), labels, backend=backend).sum.sum()

    expected = step(hidden, shard.local)
    grads = torch.autograd.grad(expected, [hidden, shard.local])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = compiled(hidden, shard.local)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [hidden, shard.local]), grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(ranks, backend):
    ranks.run(2, check_operators, backend)


def test_a_group_of_none_is_this_process_alone():
    x, labels = torch.randn(1, 3, 7), torch.tensor([[-100, 3, 1]])
    whole = sequence_logps(x[..., :5], labels)
    torch.testing.assert_close(sequence_logps(VocabShard(x, None, V=5), labels), whole)
    weight, hidden = torch.randn(7, 2), torch.randn(1, 3, 2)
    padded = linear_sequence_logps(hidden, VocabShard(weight, None, V=5), labels)
    torch.testing.assert_close(padded, linear_sequence_logps(hidden, weight[:5], labels))
    # Without padding the very tensor: backward of a slice would copy its gradient.
    assert shards.local_logits(VocabShard(x, None, V=7))[0] is x
    assert shards.local_head(hidden, VocabShard(weight, None, V=7), None)[1] is weight
