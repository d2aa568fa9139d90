"""Entropy, top-1 hit and mean logit of each active position, against float64 formulas written apart."""

import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck

from napo_loss import LowRank, VocabShard, fused_head, linear_sequence_logps
from napo_loss.logps import linear_ops
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.records import Head

N, T, D, V = 3, 7, 12, 37
BACKENDS = ["eager", "triton"]


def case(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, T, D, generator=g).to(dtype)
    weight = (0.7 * torch.randn(V, D, generator=g)).to(dtype)
    labels = torch.randint(0, V, (N, T), generator=g)
    labels[0, :3] = -100
    labels[2] = -100
    best = (hidden.double() @ weight.double().T).argmax(-1)
    labels[1, 1:5] = best[1, 0:4]  # some hits
    return hidden, weight, labels


def by_hand(hidden, weight, labels, *, bias=None, scale=1.0, cap=None, shift=True):
    """One position after the other, in float64."""
    entropy, top1, mean = torch.zeros(N, T).double(), torch.zeros(N, T, dtype=torch.bool), torch.zeros(N, T).double()
    for n in range(N):
        for t in range(T):
            at = t + int(shift)
            if at >= T or labels[n, at] == -100:
                continue
            z = weight.double() @ hidden[n, t].double()
            z = (z + (0 if bias is None else bias.double())) * scale
            z = z if cap is None else cap * torch.tanh(z / cap)
            p = (z - z.max()).exp()
            p = p / p.sum()
            entropy[n, t] = -(p[p > 0] * p[p > 0].log()).sum()
            top1[n, t] = bool((z <= z[labels[n, at]]).all())
            mean[n, t] = z.mean()
    return entropy, top1, mean


def assert_right(found, right, dtype=torch.float32):
    entropy, top1, mean = right
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.entropy.double(), entropy, **tolerance)
    torch.testing.assert_close(found.mean_logits.double(), mean, **tolerance)
    assert found.is_top1.dtype == torch.bool
    assert torch.equal(found.is_top1, top1)
    assert top1.any()
    assert not found.entropy.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"cap": 1.5}, {"cap": 2.0, "scale": 3.0, "bias": True}], ids=str)
@pytest.mark.parametrize("budget", [None, 1])
def test_statistics_are_those_of_float64(backend, dtype, head, budget):
    hidden, weight, labels = case(dtype)
    head = dict(head)
    bias = torch.linspace(-1, 1, V).to(dtype) if head.pop("bias", False) else None
    options = {"bias": bias, "logit_scale": head.get("scale"), "softcap": head.get("cap"), "logits_budget": budget}
    plain = linear_sequence_logps(hidden, weight, labels, backend=backend, **options)
    out = linear_sequence_logps(hidden, weight, labels, backend=backend, token_statistics=True, **options)
    assert plain.tokens is None
    assert torch.equal(out.sum, plain.sum)
    assert_right(out.tokens, by_hand(hidden, weight, labels, bias=bias, **head))


def test_float64():
    hidden, weight, labels = case(torch.float64)
    assert_right(
        linear_sequence_logps(hidden, weight, labels, token_statistics=True).tokens, by_hand(hidden, weight, labels),
        torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_with_and_without(backend):
    found = []
    for statistics in (False, True):
        hidden, weight, labels = case()
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        linear_sequence_logps(*leaves, labels, backend=backend, token_statistics=statistics).sum.sum().backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_unshifted_and_low_rank(backend):
    hidden, weight, labels = case()
    options = {"backend": backend, "token_statistics": True}
    moved = labels.roll(-1, 1)
    unshifted = linear_sequence_logps(hidden, weight, moved, shift=False, **options).tokens
    assert_right(unshifted, by_hand(hidden, weight, moved, shift=False))
    padded = linear_sequence_logps(hidden, weight, labels, **options).tokens
    cu = torch.arange(0, N * T + 1, T)
    packed = linear_sequence_logps(hidden.flatten(0, 1), weight, labels.flatten(), cu_seqlens=cu, **options).tokens
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b.flatten(), rtol=1e-6, atol=1e-6)
    lora_A, lora_B = torch.randn(2, D), 0.2 * torch.randn(V, 2)
    low_rank = linear_sequence_logps(hidden, LowRank(weight, lora_A, lora_B, 0.5), labels, **options).tokens
    whole = linear_sequence_logps(hidden, weight + 0.5 * lora_B @ lora_A, labels, **options).tokens
    torch.testing.assert_close(low_rank.entropy, whole.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low_rank.mean_logits, whole.mean_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1e8])
def test_excluded_tokens_and_common_offsets_leave_the_entropy(backend, offset):
    """Logits of −inf have no share in it (0·−inf); one offset of all changes nothing but the mean."""
    hidden, weight = torch.ones(1, 1, 1), torch.zeros(5, 1)
    bias = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0]) + offset
    out = linear_sequence_logps(
        hidden, weight, torch.tensor([[1]]), bias=bias, shift=False, backend=backend, token_statistics=True
    )
    assert out.sum.item() == pytest.approx(-(torch.tensor(4.0).log().item()), rel=1e-6)
    assert out.tokens.entropy.item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    assert out.tokens.is_top1.item()
    assert out.tokens.mean_logits.item() == -torch.inf


def sharded(group, backend):
    hidden, weight, labels = case()
    bias = torch.linspace(-1, 1, V)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    bounds = [0, 3, 3, 20, V] if size == 4 else [0, 20, V]  # one rank has nothing
    mine = slice(bounds[rank], bounds[rank + 1])
    shard = VocabShard(weight[mine], group, V=V, start=mine.start)
    options = {"softcap": 2.0, "logit_scale": 1.5, "backend": backend, "token_statistics": True}
    out = linear_sequence_logps(hidden, shard, labels, bias=bias[mine], **options)
    assert_right(out.tokens, by_hand(hidden, weight, labels, bias=bias, cap=2.0, scale=1.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4])
def test_of_a_vocabulary_split_over_ranks(ranks, size, backend):
    ranks.run(size, sharded, backend)


def test_compiles_as_one_graph():
    hidden, weight, labels = case()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(hidden, weight, labels):
        out = linear_sequence_logps(hidden, weight, labels, token_statistics=True)
        return out.sum, out.tokens

    total, tokens = both(hidden.requires_grad_(), weight, labels)
    total.sum().backward()
    assert_right(tokens, by_hand(hidden.detach(), weight, labels))


def test_of_a_model():
    pytest.importorskip("datasets", reason="the trl extra is not installed")
    import tiny

    model = tiny.llama()
    ids = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        z = model(input_ids=ids).logits.double()
        with fused_head(model, token_statistics=True):
            tokens = model(input_ids=ids, labels=labels).tokens
    active = torch.zeros(2, 8, dtype=torch.bool)
    active[:, 2:7] = True
    p = z.softmax(-1)
    torch.testing.assert_close(tokens.entropy.double(), (-(p * p.log()).sum(-1)).where(active, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.mean_logits.double(), z.mean(-1).where(active, 0), rtol=1e-4, atol=1e-5)
    hits = torch.zeros(2, 8, dtype=torch.bool)
    hits[:, :-1] = z[:, :-1].argmax(-1) == labels[:, 1:]
    assert torch.equal(tokens.is_top1, hits & active)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_a_vocabulary_of_several_blocks(backend, order):
    """The kernel's sums move along with a peak that rises from block to block, or never again."""
    V = 9001
    rows = 4 * torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    if order != "random":
        rows = rows.sort(-1, descending=order == "falling").values
    labels = torch.tensor([[0, V - 1, int(rows[2].argmax())]])
    found = of_rows(rows, labels, backend)
    z = rows.double()
    p = z.softmax(-1)
    torch.testing.assert_close(found.entropy[0].double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_logits[0].double(), z.mean(-1), rtol=1e-5, atol=1e-5)
    assert found.is_top1[0].tolist() == (rows.gather(1, labels.T)[:, 0] == rows.amax(1)).tolist()


def of_rows(rows, labels, backend):
    """Of these logits, to the bit: each hidden state picks a row of them."""
    given = {"shift": False, "token_statistics": True, "backend": backend}
    return linear_sequence_logps(torch.eye(len(rows))[None], rows.T.contiguous(), labels, **given).tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [5, 9001])  # in the kernel one block, and blocks with nothing in them
@pytest.mark.parametrize("finite", [[0], [3], [4], [1, 3], [0, 4]], ids=str)
def test_blocks_of_minus_infinity(backend, V, finite):
    """What the bias excludes has no share of the entropy, before the first logit and after; 0·−inf is 0."""
    at = torch.tensor(finite) * (V // 5)
    bias = torch.full((V,), -torch.inf).index_put((at,), torch.arange(len(at)) / 3)
    label = int(at[-1])
    leaves = [torch.zeros(1, 2, 3, requires_grad=True), torch.zeros(V, 3, requires_grad=True)]
    out = linear_sequence_logps(
        *leaves,
        torch.tensor([[label, (label + 1) % V]]),
        bias=bias,
        shift=False,
        token_statistics=True,
        backend=backend,
    )
    p = (torch.arange(len(at)) / 3).softmax(0)
    torch.testing.assert_close(out.tokens.entropy, -(p * p.log()).sum().expand(1, 2))
    assert out.tokens.is_top1.tolist() == [[True, False]]
    assert out.tokens.mean_logits.isneginf().all()
    out.sum.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_hits_and_a_sure_model_has_no_entropy(backend):
    assert of_rows(
        torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(4, 1), torch.arange(4)[None], backend
    ).is_top1.tolist() == [[False, True, True, False]]
    rows = torch.zeros(2, 1000)
    rows[0, 7], rows[1, 7] = 1e30, 200.0  # all other shares vanish
    assert of_rows(rows, torch.tensor([[7, 3]]), backend).entropy.tolist() == [[0.0, 0.0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter loads and stores")
def test_the_same_pass_and_two_floats_more():
    from benchmarks.traffic import Counter
    from napo_loss.kernels.linear_rows import linear_rows

    head, moved = {"bias": None, "logit_scale": 1.0, "softcap": 0.0}, []
    for statistics in (False, True):
        with Counter() as counter:
            linear_rows(torch.zeros(3, 5003), torch.zeros(3, dtype=torch.long), None, **head, statistics=statistics)
        moved.append((counter.read, counter.written))
    assert moved[1] == (moved[0][0], moved[0][1] + 2 * 4 * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, labels = case()
    head = Head.of(weight.requires_grad_(), softcap=5.0)
    call = LinearCall.of(hidden.requires_grad_(), head, labels, budget=3000, token_statistics=True, backend=backend)
    opcheck(linear_ops.linear_logps.definition, (), call.to_schema())
