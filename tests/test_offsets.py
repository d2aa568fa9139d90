"""A common offset of the logits is nothing to a softmax: peak and log-total are kept apart, and it loses nothing."""

import pytest
import torch
import torch.distributed as dist

from napo_loss import VocabShard, linear_sequence_logps, sequence_logps

BACKENDS = ["eager", "triton"]
OFFSETS = [0.0, 1e4, -1e6, 1e8]
V = 9
LABELS = torch.tensor([[-100, 1, 4, 8], [-100, -100, 0, 3]])
STEPS = torch.randint(-3, 3, (2, 4, V), generator=torch.Generator().manual_seed(0)) * 8.0
"""Multiples of eight: exact in float32 beside 1e8."""


def right(logits, labels=LABELS):
    """Sums and gradients of their sum in float64."""
    x = logits.detach().double().requires_grad_()
    y = labels[:, 1:]
    logps = x[:, :-1].log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0].where(y != -100, 0).sum(1)
    logps.sum().backward()
    return logps.detach(), x.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("uniform", [False, True])
def test_from_logits(backend, offset, uniform):
    logits = ((0 if uniform else 1) * STEPS + offset).requires_grad_()
    out = sequence_logps(logits, LABELS, backend=backend).sum
    out.sum().backward()
    sums, grads = right(logits)
    torch.testing.assert_close(out.double(), sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("budget", [None, 1])
def test_from_hidden_states(backend, offset, budget):
    """The offset comes with a bias; every gradient is that of float64."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randint(-2, 3, shape, generator=g) * 4.0 for shape in ((2, 4, 4), (V, 4)))
    bias = torch.full((V,), offset)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_sequence_logps(*leaves[:2], LABELS, bias=leaves[2], backend=backend, logits_budget=budget).sum
    out.sum().backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    y = LABELS[:, 1:]
    sums = logits[:, :-1].log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0].where(y != -100, 0).sum(1)
    sums.sum().backward()
    torch.testing.assert_close(out.double(), sums.detach(), rtol=1e-6, atol=1e-6)
    for ours, x in zip(leaves, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), x.grad, rtol=1e-5, atol=1e-5)


def sharded(group, backend, offset):
    logits = STEPS + offset
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    bounds = [0, 2, 2, 5, V] if size == 4 else [0, 4, V]
    mine = slice(bounds[rank], bounds[rank + 1])
    local = logits[..., mine].clone().requires_grad_()
    out = sequence_logps(VocabShard(local, group, V=V, start=mine.start), LABELS, backend=backend).sum
    out.sum().backward()
    sums, grads = right(logits)
    torch.testing.assert_close(out.double(), sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(local.grad.double(), grads[..., mine], rtol=1e-5, atol=1e-7)
    weight = torch.eye(V)[mine].requires_grad_()
    shard = VocabShard(weight, group, V=V, start=mine.start)
    hidden, bias = STEPS.clone().requires_grad_(), torch.full((V,), offset)[mine]
    out = linear_sequence_logps(hidden, shard, LABELS, bias=bias, backend=backend).sum
    out.sum().backward()
    torch.testing.assert_close(out.double(), sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_of_a_vocabulary_split_over_ranks(ranks, size, offset, backend):
    ranks.run(size, sharded, backend, offset)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_and_labels_there(backend):
    logits = torch.zeros(1, 3, 5)
    logits[..., 2] = -torch.inf
    logits.requires_grad_()
    out = sequence_logps(logits, torch.tensor([[-100, 1, 3]]), backend=backend).sum
    assert out.item() == pytest.approx(-2 * torch.tensor(4.0).log().item())
    out.sum().backward()
    assert logits.grad.isfinite().all()
    excluded = sequence_logps(logits.detach(), torch.tensor([[-100, 2, 3]]), backend=backend).sum
    assert excluded.item() == -torch.inf


LARGE = {torch.float32: 1e8, torch.bfloat16: 1e8, torch.float16: 6e4, torch.float64: 1e15}


def neighbours(offset, dtype, *shape):
    """The offset and the next three numbers that the dtype has there."""
    offset = torch.tensor(offset).to(dtype)
    ulp = torch.nextafter(offset.abs(), torch.tensor(torch.inf, dtype=dtype)) - offset.abs()
    return offset + torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(2)).to(dtype) * ulp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("size", [1, 9, 9001])  # 9001: several blocks, and several programs for a row
@pytest.mark.parametrize("sign", [1, -1])
def test_of_every_dtype_and_size(backend, dtype, size, sign):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("kernels compute in float32")
    logits = neighbours(sign * LARGE[dtype], dtype, 2, 4, size)
    logits[..., 1::9] = -torch.inf  # and what a mask excludes
    labels = LABELS.where(LABELS < 0, LABELS % size // 9 * 9)
    sums, grads = right(logits, labels)
    for inplace in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        out = sequence_logps(leaf * 1, labels, backend=backend, inplace_backward=inplace).sum
        out.sum().backward()
        torch.testing.assert_close(out.double(), sums, rtol=1e-6, atol=1e-6)
        eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-6
        torch.testing.assert_close(leaf.grad.double(), grads, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [1, 2**28])  # dlogits computed again, or kept
def test_from_hidden_states_of_every_dtype(backend, dtype, budget):
    """The offset is in the products themselves: each hidden state picks a row of the logits."""
    A, size = 4, 5003
    rows, labels = neighbours(LARGE[dtype], dtype, A, size), torch.tensor([[3, -100, 700, 5002]])
    hidden, weight = torch.eye(A, dtype=dtype)[None], rows.T.contiguous().requires_grad_()
    out = linear_sequence_logps(
        hidden, weight, labels, shift=False, logits_budget=budget, token_statistics=True, backend=backend
    )
    out.sum.sum().backward()
    z = rows.double().requires_grad_()
    sums = z.log_softmax(-1)[[0, 2, 3], [3, 700, 5002]].sum()
    sums.backward()
    torch.testing.assert_close(out.sum.double(), sums.detach()[None], rtol=1e-6, atol=1e-5)
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(weight.grad.T.double(), z.grad, rtol=eps, atol=1e-6)
    p = z.detach().softmax(-1)
    active = labels[0] >= 0
    entropy = -torch.special.xlogy(p, p).sum(-1) * active
    torch.testing.assert_close(out.tokens.entropy[0].double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.tokens.mean_logits[0].double(), z.detach().mean(-1) * active, rtol=1e-6, atol=0)
    of_label = rows.gather(1, labels.T.clamp_min(0))[:, 0]
    assert torch.equal(out.tokens.is_top1[0], active & (of_label == rows.amax(1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_of_weight_zero_does_not_count_though_it_is_excluded(backend, packed):
    logits = torch.zeros(3, 4).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(-torch.inf)).requires_grad_()
    labels, weights, given = torch.tensor([-100, 1, 2]), torch.tensor([1.0, 0.0, 1.0]), {"backend": backend}
    if packed:
        out = sequence_logps(logits, labels, token_weights=weights, cu_seqlens=torch.tensor([0, 3]), **given)
    else:
        out = sequence_logps(logits[None], labels[None], token_weights=weights[None], **given)
    assert out.sum.item() == pytest.approx(-torch.tensor(4.0).log().item())
    out.sum.sum().backward(retain_graph=True)
    assert logits.grad.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum * torch.nan, logits, torch.ones(1))  # nor where the loss is NaN
    assert torch.equal(grad[0], torch.zeros(4))
    assert grad[1].isnan().all()
