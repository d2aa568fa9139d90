"""What test files of ``fused_head`` share: the comparison with the model's own logits."""

from __future__ import annotations

import torch

from napo_loss import fused_head, sequence_logps


def gradients(model, logps):
    model.zero_grad()
    (logps.sum * torch.linspace(-1, 1, len(logps.sum))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, labels, **kwargs):
    """Log-probs and every gradient are those of the model's own logits; afterwards the model is as it was."""
    logits = model(**inputs).logits[:, -labels.shape[1] :]  # virtual tokens of prompt learning come first
    expected = sequence_logps(logits, labels, **kwargs)
    expected_grads = gradients(model, expected)
    assert expected_grads
    with fused_head(model):
        logps = model(**inputs, labels=labels, **kwargs)
        assert hasattr(model(**inputs), "logits")  # without labels nothing changes
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    grads = gradients(model, logps)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5, msg=name)
    assert hasattr(model(**inputs, labels=labels), "logits")
