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
