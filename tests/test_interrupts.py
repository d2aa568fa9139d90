"""After an error at any line, forward or backward, the next call is right and nothing global has changed."""

import copy

import pytest
import torch

from interrupted import Interrupt, assert_equal, global_state, places
from napo_loss import LowRank, NaPOLoss, Negative, Recipe, fused_head, linear_sequence_logps, napo_loss, sequence_logps
from napo_loss.logps import gemm

N, T, D, V = 4, 7, 6, 33
LABELS = torch.arange(N * T).view(N, T) % V
LABELS[1, :3] = -100


def logits():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, T, V, generator=g).bfloat16().requires_grad_()

    def step():
        chosen, rejected = sequence_logps(x, LABELS, token_weights=torch.ones(N, T)).pairs()
        out = napo_loss(chosen, rejected, None, None)
        return [out.losses, out.q, *torch.autograd.grad(out.losses.sum(), x)]

    return step, [x]


def hidden():
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, T, D), "weight": (V, D), "bias": (V,), "A": (2, D), "B": (V, 2)}
    x = {name: torch.randn(shape, generator=g).bfloat16().requires_grad_() for name, shape in shapes.items()}

    def step():
        head = LowRank(x["weight"], x["A"], x["B"], 0.5)
        budget = 9 * V * 4  # a few rows at a time, and dlogits are made again
        out = linear_sequence_logps(
            x["hidden"], head, LABELS, bias=x["bias"], softcap=3.0, logits_budget=budget, token_statistics=True
        )
        return [out.sum, *out.tokens, *torch.autograd.grad(out.sum @ torch.linspace(-1, 1, N), list(x.values()))]

    return step, list(x.values())


def objective():
    g = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 5, generator=g).bfloat16().requires_grad_(), None
    negatives = {"rejected": Negative(q=0.2), "image_only": Negative(estimator="moment")}
    module = NaPOLoss(recipe=Recipe(negatives, decay=0.5, sft_weight=0.1))

    def step():
        module.previous_moments = None
        for _ in range(2):  # the second reads what the first has left
            out = module(chosen[0], {name: chosen[1] - k for k, name in enumerate(negatives)}, None, rejected)
        return [out.losses, out.q, out.moments, *torch.autograd.grad(out.losses.sum(), chosen)]

    return step, [chosen]


CASES = [
    *((function, error, 10) for function in (logits, hidden, objective) for error in (KeyboardInterrupt, RuntimeError)),
    *(
        pytest.param(function, KeyboardInterrupt, None, marks=pytest.mark.slow)
        for function in (logits, hidden, objective)
    ),
]


@pytest.mark.parametrize(("function", "error", "count"), CASES)
def test_the_next_call_is_right(function, error, count, monkeypatch):
    # As on a GPU, where a switch of cuBLAS is set around each product of half precision.
    monkeypatch.setattr(gemm, "rounds_once", lambda device_type: True)
    step, inputs = function()
    expected, given, before = step(), [x.detach().clone() for x in inputs], global_state()
    for at in places(step, count):
        with pytest.raises(error, match=r"at \w+\.py:\d+"), Interrupt(at, error):
            step()
        assert global_state() == before, at
        assert_equal([x.detach() for x in inputs], given, at)
        assert_equal(step(), expected, at)


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_model_is_as_it_was(count):
    """Each time a model that the package has not met, so that what it remembers of one is interrupted too."""
    pytest.importorskip("datasets", reason="the trl extra is not installed")
    import tiny

    llama = tiny.llama()
    ids = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))

    def step(model):
        with fused_head(model, token_statistics=True):
            out = model(input_ids=ids, labels=ids)
        model.zero_grad()
        (out.sum @ torch.tensor([1.0, -0.5])).backward()
        return [out.sum, *out.tokens, *(p.grad.clone() for p in model.parameters())]

    expected, before = step(copy.deepcopy(llama)), global_state(llama)
    for at in places(lambda: step(copy.deepcopy(llama)), count):
        model = copy.deepcopy(llama)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            step(model)
        assert global_state(model) == before, at
        assert model(input_ids=ids, labels=ids).logits.shape == (2, 8, llama.config.vocab_size), at
        assert_equal(step(model), expected, at)
