"""What goes wrong around the functions: memory that ends, a machine without a GPU, transforms that they do not know."""

import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from apart import apart
from napo_loss import LowRank, SequenceLogps, linear_sequence_logps, napo_loss, sequence_logps
from napo_loss.logps import gemm, linear_ops, memory
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.records import Head, Saved

# PyTorch's own, of its forward-mode formulas.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

N, T, D, V = 2, 9, 5, 40
LABELS = torch.arange(N * T).view(N, T) % V
BUDGET = 7 * V * 4  # seven rows of logits in float32


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=g, dtype=dtype).requires_grad_()
        for name, shape in {"hidden": (N, T, D), "weight": (V, D), "bias": (V,), "A": (2, D), "B": (V, 2)}.items()
    }


def step(x, **options):
    logps = linear_sequence_logps(
        x["hidden"], LowRank(x["weight"], x["A"], x["B"], 0.5), LABELS, bias=x["bias"], logits_budget=BUDGET,
        token_statistics=True, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(logps.sum @ torch.tensor([1.0, -0.3]).to(logps.sum), list(x.values()))
    return [logps.sum, logps.length, *logps.tokens, *grads]


def no_memory_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory_on_a_cpu():
    """PyTorch's own error, whose words are all that tells it from others: no machine has so much."""
    torch.empty(2**60, dtype=torch.uint8)


def another_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Failing:
    """``gemm.mm_float32`` as long as there is memory."""

    def __init__(self, at, error=no_memory_on_a_gpu):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, *given, **named):
        self.calls += 1
        if self.calls in self.at:
            self.error()
        return gemm.mm_float32(*given, **named)


@pytest.fixture
def products(monkeypatch):
    def fail(at, **options):
        failing = Failing(at, **options)
        monkeypatch.setattr("napo_loss.logps.factored.mm_float32", failing)
        return failing

    return fail


# Memory


NO_MEMORY = [no_memory_on_a_gpu, no_memory_on_a_cpu]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_chunk_that_does_not_fit_is_halved_and_changes_nothing(products, error):
    whole = step(tensors())
    counted = products(())
    step(tensors())
    outside = 0
    for at in range(1, counted.calls + 1):
        products((at,), error=error)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = step(tensors())
            except RuntimeError:  # outside a chunk, where nothing can be made smaller
                outside += 1
                continue
        assert len(told) == 1
        assert "out of memory with" in str(told[0].message)
        apart(found, whole)
        for a, b in zip(found, whole, strict=True):
            torch.testing.assert_close(a, b)
    assert outside == 2  # h·lora_Aᵀ of all rows, and the gradient of lora_A


@pytest.mark.parametrize(
    ("error", "message"), [(no_memory_on_a_gpu, "CUDA out of memory"), (no_memory_on_a_cpu, "DefaultCPUAllocator")]
)
def test_a_second_time_it_is_the_callers(products, error, message):
    products((1, 2), error=error)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(RuntimeError, match=message):
        step(tensors())


def test_other_errors_are_passed_on(products):
    products((1,), error=another_error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step(tensors())


def test_parts_are_halved_once_and_in_order():
    done, tries = [], []

    def work(part):
        tries.append(part)
        if len(tries) == 2:
            raise torch.OutOfMemoryError("full")
        done.extend(range(part.start, part.stop))

    with pytest.warns(UserWarning, match="with 4 rows"):
        memory.in_parts(work, [slice(0, 4), slice(4, 8), slice(8, 9)], alone=True)
    assert done == list(range(9))
    assert [(x.start, x.stop) for x in tries] == [(0, 4), (4, 8), (4, 6), (6, 8), (8, 9)]


@pytest.mark.parametrize("alone", [True, False])
def test_ranks_that_wait_for_each_other_keep_their_parts(alone):
    def work(part):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        memory.in_parts(work, [slice(0, 1 if alone else 4)], alone=alone)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_the_probe_does_not_take_full_memory_for_a_missing_feature(error, monkeypatch):
    gemm._has_out_dtype.cache_clear()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: error())
    with pytest.raises(RuntimeError, match="memory"):
        gemm._has_out_dtype("cpu", torch.bfloat16)
    assert gemm._has_out_dtype.cache_info().currsize == 0


# Backends


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_kernels_without_a_gpu_say_what_they_need(call, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = tensors()
    with pytest.raises(ValueError, match=f"backend='triton' needs a GPU, but {call} is on cpu.*TRITON_INTERPRET=1"):
        functions(x)[call](x["hidden"], backend="triton")


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_kernels_refuse_what_they_would_round(call):
    x = tensors(torch.float64)
    with pytest.raises(TypeError, match=f"computes in float32, but {call} is float64"):
        functions(x)[call](x["hidden"], backend="triton")
    assert functions(x)[call](x["hidden"]).sum.dtype == torch.float64


def functions(x):
    return {
        "logits": lambda hidden, **o: sequence_logps(hidden @ x["weight"].t(), LABELS, **o),
        "hidden": lambda hidden, **o: linear_sequence_logps(hidden, x["weight"], LABELS, **o),
    }


# Transforms


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_forward_mode_is_refused_and_not_zero(call):
    x = {name: t.detach() for name, t in tensors().items()}
    of_hidden = functions(x)[call]
    message = re.escape("has no forward-mode derivative (jvp, jacfwd); use reverse mode")
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda h: of_hidden(h).sum, (x["hidden"],), (x["hidden"],))
    for context in (torch.no_grad(), torch.enable_grad()):
        with forward_ad.dual_level(), context, pytest.raises(NotImplementedError, match=message):
            of_hidden(forward_ad.make_dual(x["hidden"], x["hidden"]))
    with forward_ad.dual_level():  # what has no tangent is no matter of forward mode
        torch.testing.assert_close(of_hidden(x["hidden"]).sum, of_hidden(x["hidden"].clone()).sum)


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_gradients_by_torch_func_are_those_of_autograd(call):
    x = {name: t.detach() for name, t in tensors().items()}

    def loss(hidden):
        chosen, rejected = functions(x)[call](hidden).pairs()
        return napo_loss(chosen, rejected, None, None).losses.mean()

    hidden = x["hidden"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    torch.testing.assert_close(torch.func.grad(loss)(x["hidden"]), expected)
    _, vjp = torch.func.vjp(loss, x["hidden"])
    torch.testing.assert_close(vjp(torch.tensor(2.0))[0], 2 * expected)


def test_pairs_under_every_transform():
    x, lengths = torch.randn(3, 6), torch.ones(6)

    def split(row):
        chosen, rejected = SequenceLogps(row, lengths).pairs(K=2)
        return torch.cat([chosen.sum, 2 * rejected.sum.flatten()])

    expected = torch.cat([x[:, :2], 2 * x[:, 2:]], 1)
    torch.testing.assert_close(torch.vmap(split)(x), expected)
    slope = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0]))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(split)(x[0]), slope)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(split(forward_ad.make_dual(x[0], torch.ones(6)))).tangent
    torch.testing.assert_close(tangent, slope.sum(1))


def test_the_loss_has_every_derivative_of_its_formula():
    chosen, rejected = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])

    def loss(margin):
        return napo_loss(chosen + margin, rejected, None, None).losses

    x = torch.tensor([0.3, -0.2])
    psi = chosen + x - rejected
    q = 2 * (1 - torch.sigmoid(0.01 * psi.mean()))
    p = torch.sigmoid(0.1 * psi)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(loss)(x), torch.diag(-0.1 * p**q * (1 - p)))


# Tensors without values


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_shapes_of_meta_tensors(call):
    x = {name: torch.empty_like(t, device="meta").requires_grad_() for name, t in tensors().items()}
    hidden, labels = x["hidden"], LABELS.to("meta")
    if call == "logits":
        logps = sequence_logps(hidden @ x["weight"].t(), labels)
    else:
        logps = linear_sequence_logps(hidden, x["weight"], labels, token_statistics=True)
        assert logps.tokens.entropy.shape == (N, T)
    loss = napo_loss(*logps.pairs(), None, None).losses
    loss.mean().backward()
    assert loss.shape == (N // 2,)
    assert hidden.grad.shape == hidden.shape
    assert x["weight"].grad.shape == (V, D)
    assert all(t.is_meta for t in (*logps[:2], loss, hidden.grad))


@pytest.mark.parametrize("symbols", [None, ShapeEnv])
@pytest.mark.parametrize("max_active", [None, N * T])
@pytest.mark.filterwarnings("error:.*data pointer")
def test_shapes_of_fake_tensors(symbols, max_active):
    x = tensors()
    with FakeTensorMode(shape_env=symbols and symbols()) as mode:
        hidden, weight, labels = (mode.from_tensor(t, static_shapes=True) for t in (x["hidden"], x["weight"], LABELS))
        logps = linear_sequence_logps(hidden, weight, labels, max_active=max_active)
        napo_loss(*logps.pairs(), None, None).losses.mean().backward()
        assert logps.sum.shape == (N,)
        assert hidden.grad.shape == (N, T, D)
        assert weight.grad.shape == (V, D)


def test_a_bound_is_the_size_of_what_is_saved():
    """Of fake tensors, too, which without it know of no size but that of all positions."""
    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(torch.zeros(shape)) for shape in ((2, 6, 4), (9, 4)))
        head = Head.of(weight, None, logit_scale=None, softcap=None)
        for bound, size in ((5, 5), (0, 12)):
            call = LinearCall.of(hidden, head, mode.from_tensor(torch.zeros(2, 6).long()), max_active=bound)
            _, _, *saved = linear_ops.linear_logps(**call.to_schema())
            assert Saved(*saved).rows.shape == (size,)
