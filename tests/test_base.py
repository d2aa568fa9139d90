"""Exponentials are taken below a base that is fixed before a row is read: right wherever the largest logit is."""

import pytest
import torch

from napo_loss import linear_sequence_logps, reference, sequence_logps

V = 9001
PLACES = {"edge": 0, "label": 4000, "loop": 3000, "last block": 8990, "end": V - 1}
HEIGHTS = [0.0, 20.0, 41.5, 60.0, 1000.0]  # nats above the rest; from 41.6 on a row is read again
LABEL = 4000


def row(place, height, dtype, offset):
    x = torch.randn(V, generator=torch.Generator().manual_seed(0))
    x[PLACES[place]] = height
    return (x + offset).to(dtype)


def assert_close(found, exact, logp):
    """To float32 of log-probs as large as these."""
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=3e-6 * (1 + abs(float(logp))))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0.0), (torch.float32, -3e4), (torch.bfloat16, 0.0)])
def test_from_logits(place, height, dtype, offset):
    x = row(place, height, dtype, offset)[None, None].requires_grad_()
    labels = torch.tensor([[LABEL]])
    leaf = x.detach().double().requires_grad_()
    exact = reference.sequence_logps(leaf, labels, shift=False).sum
    found = sequence_logps(x, labels, shift=False, backend="triton").sum
    assert_close(found.detach(), exact.detach(), exact.detach())
    found.sum().backward()
    exact.sum().backward()
    assert x.grad is not None
    assert leaf.grad is not None
    tolerance = 3e-6 * (1 + abs(float(exact.detach())))
    if dtype == torch.bfloat16:
        tolerance = 2**-7  # the interpreter truncates
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_from_hidden_states(backend, dtype, place, height, softcap):
    """One hidden state of 1, so that the head is the row of logits."""
    hidden = torch.ones(1, 1, 1, dtype=dtype).requires_grad_()
    weight = row(place, height, dtype, 0.0)[:, None].requires_grad_()
    labels = torch.tensor([[LABEL]])
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = linear_sequence_logps(*leaves, labels, shift=False, softcap=softcap, token_statistics=True)
    found = linear_sequence_logps(
        hidden, weight, labels, shift=False, softcap=softcap, token_statistics=True, backend=backend
    )
    logp = exact.sum.detach()
    plain = linear_sequence_logps(hidden, weight, labels, shift=False, softcap=softcap, backend=backend)
    for sums in (found.sum, plain.sum):
        assert_close(sums.detach(), logp, logp)
    assert found.tokens is not None
    assert exact.tokens is not None
    assert torch.equal(found.tokens.is_top1, exact.tokens.is_top1)
    torch.testing.assert_close(found.tokens.entropy.double(), exact.tokens.entropy, rtol=1e-5, atol=1e-5)
    exact_grads = torch.autograd.grad(exact.sum.sum(), leaves)
    for sums in (found.sum, plain.sum):
        for grad, wanted in zip(torch.autograd.grad(sums.sum(), (hidden, weight)), exact_grads, strict=True):
            error = (grad.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
            bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
            assert error < bound or (grad.double() - wanted).abs().max() < 1e-4
