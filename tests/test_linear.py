"""The factored lm_head, kernels (interpreted here) and eager path, against float64 of the plain computation."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from draws import examples, quick
from napo_loss import LowRank, linear_sequence_logps, reference, sequence_logps
from napo_loss.logps import factored, gemm, linear_ops
from napo_loss.logps.calls import LinearCall
from napo_loss.logps.records import Head

BACKENDS = ["eager", "triton"]
NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B")
seeds = st.integers(0, 2**31)


def example(seed=0, N=3, T=6, D=8, V=37, r=2, dtype=torch.float32, masked=0.4):
    """Tensors by name (``hidden [N, T, D]``, the head's), labels, token weights and an upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, T, D), "weight": (V, D), "bias": (V,), "lora_A": (r, D), "lora_B": (V, r)}
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(0, V, (N, T), generator=g).masked_fill(torch.rand(N, T, generator=g) < masked, -100)
    return tensors, labels, torch.rand(N, T, generator=g), torch.randn(N, generator=g)


def run(function, tensors, labels, upstream, *, trained=NAMES, low_rank=False, bias=True, dtype=None, **kwargs):
    """``sum``, ``length`` and the gradients by name."""
    used = [n for n in NAMES if ("lora" not in n or low_rank) and (n != "bias" or bias)]
    leaves = {n: tensors[n].detach().to(dtype or tensors[n].dtype).requires_grad_(n in trained) for n in used}
    weight = LowRank(leaves["weight"], leaves["lora_A"], leaves["lora_B"], 0.5) if low_rank else leaves["weight"]
    out = function(leaves["hidden"], weight, labels, bias=leaves.get("bias"), **kwargs)
    if out.sum.requires_grad:
        out.sum.backward(upstream.to(out.sum.dtype))
    return out.sum.detach().double(), out.length.double(), {n: leaves[n].grad for n in used if n in trained}


def assert_matches(tensors, labels, upstream, token_weights=None, backend="eager", budget=None, **kwargs):
    """The house rule: error against float64 at most that of the same-dtype eager computation, and a small eps."""
    weighted = {} if token_weights is None else {"token_weights": token_weights}
    exact = run(reference.linear_sequence_logps, tensors, labels, upstream, dtype=torch.float64,
                **{k: w.double() for k, w in weighted.items()}, **kwargs)  # fmt: skip
    plain = run(reference.linear_sequence_logps, tensors, labels, upstream,
                **{k: w.to(tensors["hidden"].dtype) for k, w in weighted.items()}, **kwargs)  # fmt: skip
    ours = run(linear_sequence_logps, tensors, labels, upstream, backend=backend, logits_budget=budget,
               **weighted, **kwargs)  # fmt: skip
    half = tensors["hidden"].dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(tensors["hidden"].dtype).eps if half else 4e-6
    # An entry of dlogits is of size 1 and rounded; where they cancel (V = 1: all are 0) that much of what they multiply
    # is left.
    left = eps * upstream.norm() * (kwargs.get("logit_scale") or 1) * max(1, tensors["hidden"].norm(dim=-1).max())
    assert (ours[0] - exact[0]).abs().max() <= (plain[0] - exact[0]).abs().max() + 1e-5 * (1 + exact[0].abs().max())
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-6, atol=1e-6)
    assert ours[2].keys() == exact[2].keys()
    for name, grad in ours[2].items():
        assert grad.dtype == tensors[name].dtype
        error, allowed = (grad.double() - exact[2][name]).norm(), (plain[2][name].double() - exact[2][name]).norm()
        # Half precision: dlogits, the factor beside and the result are rounded once each (the interpreter truncates).
        assert error <= allowed + (2 if half else 1) * eps * exact[2][name].norm() + left, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@examples(25)
@given(
    seeds, st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 2, 15, 16, 37, 1000, 5003]),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 2.0, 30.0]),
    st.sampled_from([None, 0.25, 2.0]), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([None, 1, 999, 40_000]),
)  # fmt: skip
def test_matches_the_reference(
    backend, dtype, seed, N, T, D, V, shift, weighted, low_rank, bias, softcap, scale, masked, budget
):
    tensors, labels, weights, upstream = example(seed, N, T, D, V, dtype=dtype, masked=masked)
    assert_matches(
        tensors, labels, upstream, weights if weighted else None, backend, budget, shift=shift, low_rank=low_rank,
        bias=bias, softcap=softcap, logit_scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_beyond_a_softcap_are_at_it(backend):
    """However far: tanh is ±1 there, and nothing overflows on the way to it."""
    hidden = torch.ones(1, 6, 1)
    weight = torch.tensor([-1e30, -1e4, -90.0, 0.5, 90.0, 1e30])[:, None]
    labels = torch.arange(6)[None]
    given = {"softcap": 2.0, "shift": False}
    out = linear_sequence_logps(hidden, weight, labels, backend=backend, token_statistics=True, **given)
    exact = reference.linear_sequence_logps(hidden.double(), weight.double(), labels, **given)
    torch.testing.assert_close(out.sum.double(), exact.sum, rtol=1e-6, atol=1e-6)
    mean = (2 * torch.tanh(weight.double() / 2)).mean()
    torch.testing.assert_close(out.tokens.mean_logits.double(), mean.expand(1, 6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_budget_changes_nothing_beyond_rounding(backend, low_rank):
    tensors, labels, _, upstream = example(1, 4, 9, 16, 300)
    kwargs = {"low_rank": low_rank, "softcap": 5.0, "backend": backend}
    results = [
        run(linear_sequence_logps, tensors, labels, upstream, logits_budget=b, **kwargs) for b in (1, 5000, 2**30)
    ]
    for a, b in pairwise(results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def flops(monkeypatch):
    """FLOPs of every product, wherever it is made."""
    seen = []

    def counted(function, sizes):
        def call(*args, **kwargs):
            m, k, n = sizes(*args)
            seen.append(2 * m * k * n)
            return function(*args, **kwargs)

        return call

    of_product = lambda a, b, out=None: (*a.shape, b.shape[1])  # noqa: E731
    monkeypatch.setattr(factored, "mm_float32", counted(gemm.mm_float32, of_product))
    monkeypatch.setattr(factored, "mm_into", counted(gemm.mm_into, lambda out, a, b: (*a.shape, b.shape[1])))
    return seen


@pytest.mark.parametrize(
    ("trained", "budget", "products"),
    [
        ((), 2**30, 1),
        (("hidden",), 2**30, 2),
        (("hidden",), 1000, 2),
        (("hidden", "weight"), 2**30, 3),
        (("hidden", "weight"), None, 3),  # a share of the free memory, of which there is more than these few bytes
        (("hidden", "weight"), 1000, 4),
        (("weight",), 2**30, 2),
    ],
)
def test_products_are_counted(flops, trained, budget, products):
    """1 under no_grad, 2 with a frozen head, 3 with dlogits kept, 4 with them recomputed; over active rows only."""
    tensors, labels, _, upstream = example(2, 4, 10, 16, 200, masked=0.7)
    run(linear_sequence_logps, tensors, labels, upstream, trained=trained, bias=False, logits_budget=budget)
    active = int((labels[:, 1:] != -100).sum())
    assert sum(flops) == products * 2 * active * 16 * 200


def test_without_grad_only_the_first_product_runs(flops):
    tensors, labels, _, _ = example(3)
    weight = tensors["weight"].requires_grad_()
    with torch.no_grad():
        linear_sequence_logps(tensors["hidden"].requires_grad_(), weight, labels)
    assert len(flops) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_positions_are_never_read_and_get_exactly_zero(backend, poison):
    tensors, labels, _, upstream = example(4)
    masked = torch.ones(3, 6, dtype=torch.bool)
    masked[:, :-1] = labels[:, 1:] == -100
    clean = run(linear_sequence_logps, tensors, labels, upstream, backend=backend)
    tensors["hidden"] = tensors["hidden"].masked_fill(masked[..., None], poison)
    dirty = run(linear_sequence_logps, tensors, labels, upstream, backend=backend)
    torch.testing.assert_close(clean, dirty, rtol=0, atol=0)
    assert (dirty[2]["hidden"][masked] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_active(backend):
    tensors, labels, _, upstream = example(5)
    sums, lengths, grads = run(
        linear_sequence_logps, tensors, labels.fill_(-100), upstream, low_rank=True, backend=backend
    )
    assert (sums == 0).all()
    assert (lengths == 0).all()
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", quick([2**30], [4000, 2**30]))
def test_runs_are_bit_identical(backend, budget):
    args = example(6, 4, 8, 16, 500, dtype=torch.bfloat16)
    runs = [
        run(linear_sequence_logps, args[0], args[1], args[3], backend=backend, logits_budget=budget) for _ in range(3)
    ]
    for again in runs[1:]:
        torch.testing.assert_close(again, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("budget", [1, 2**30])
def test_float64_gradcheck_twice_through_one_graph(budget):
    tensors, labels, weights, upstream = example(7, 2, 4, 3, 7, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(hidden, weight, bias, lora_A, lora_B):
        return linear_sequence_logps(
            hidden, LowRank(weight, lora_A, lora_B, 0.7), labels, bias=bias, softcap=3.0, logit_scale=1.5,
            token_weights=weights, logits_budget=budget,
        ).sum  # fmt: skip

    assert gradcheck(function, leaves)
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, upstream.double(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, upstream.double()), first, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    tensors, labels, _, _ = example(8)
    hidden = tensors["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_sequence_logps(hidden, tensors["weight"], labels).sum.sum(), hidden, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"napo_loss\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_what_a_linear_layer_would(dtype):
    tensors, labels, _, upstream = example(9, D=16)
    tensors["hidden"] = tensors["hidden"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(linear_sequence_logps, tensors, labels, upstream, low_rank=True)
    half = {n: x.bfloat16() for n, x in tensors.items()}
    expected = run(linear_sequence_logps, half, labels, upstream, low_rank=True)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=1e-3)  # the bias stays float32
    assert ours[2]["weight"].dtype == torch.float32
    assert ours[2]["hidden"].dtype == dtype


def test_autocast_leaves_float64_alone():
    """So does a linear layer, which refuses it beside another dtype."""
    tensors, labels, _, upstream = example(9, D=16, dtype=torch.float64)
    expected = run(linear_sequence_logps, tensors, labels, upstream, low_rank=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(linear_sequence_logps, tensors, labels, upstream, low_rank=True)
        for name in ("hidden", "weight"):
            with pytest.raises(TypeError, match="weight must have hidden's dtype"):
                run(linear_sequence_logps, tensors | {name: tensors[name].float()}, labels, upstream)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(ours[2][name], grad) for name, grad in expected[2].items())


def test_half_precision_products_keep_float32():
    """bf16-rounded logits would cost about 0.01 nat per token here; ours cost the rounding of the inputs only."""
    tensors, labels, _, upstream = example(10, 2, 50, 64, 500, dtype=torch.bfloat16, masked=0.0)
    exact = run(reference.linear_sequence_logps, tensors, labels, upstream, dtype=torch.float64)[0]
    ours = run(linear_sequence_logps, tensors, labels, upstream)[0]
    assert (ours - exact).abs().max() < 1e-3
    plain = run(reference.linear_sequence_logps, tensors, labels, upstream)[0]
    assert (plain - exact).abs().max() > 0.05


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 40, 5000), (3, 5000, 40), (17, 16, 16)])
def test_upcast_products(monkeypatch, m, k, n):
    monkeypatch.setattr(gemm, "UPCAST_BYTES", 4000)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    out = gemm.mm_float32(a, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


# Packed sequences


def pack(x, lengths):
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@examples(25)
@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_packed_is_padded(backend, seed, lengths, shift, weighted):
    if not sum(lengths):
        lengths = [*lengths, 1]
    N, T = len(lengths), max(lengths)
    tensors, labels, weights, upstream = example(seed, N, T)
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = -100
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    kwargs = {"shift": shift, "backend": backend}
    packed_kwargs = {**kwargs, "cu_seqlens": cu}
    if weighted:
        kwargs["token_weights"], packed_kwargs["token_weights"] = weights, pack(weights, lengths)
    flat = {**tensors, "hidden": pack(tensors["hidden"], lengths)}
    a = run(linear_sequence_logps, tensors, labels, upstream, **kwargs)
    b = run(linear_sequence_logps, flat, pack(labels, lengths), upstream, **packed_kwargs)
    a[2]["hidden"] = pack(a[2]["hidden"], lengths)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    logits = (tensors["hidden"] @ tensors["weight"].T).requires_grad_()
    flat_logits = pack(logits.detach(), lengths).requires_grad_()
    a = sequence_logps(logits, labels, **kwargs)
    b = sequence_logps(flat_logits, pack(labels, lengths), **packed_kwargs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.sum.backward(upstream)
    b.sum.backward(upstream)
    torch.testing.assert_close(pack(logits.grad, lengths), flat_logits.grad, rtol=1e-5, atol=1e-5)


def test_wrong_offsets_on_a_gpu_are_nan(monkeypatch):
    """Where looking would cost a sync nothing is read out of bounds, and the result shows it."""
    monkeypatch.setattr("napo_loss.logps.linear.check_cu_seqlens", lambda *_: None)
    tensors, labels, _, _ = example(11, 1, 6)
    for wrong in ([0, 9], [1, 6], [0, 4, 2, 6], [-3, 6]):
        out = linear_sequence_logps(tensors["hidden"][0], tensors["weight"], labels[0], cu_seqlens=torch.tensor(wrong))
        assert out.sum.isnan().all(), wrong


# Inside PyTorch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", quick([3000], [3000, 2**30]))
def test_opcheck(backend, budget):
    tensors, labels, _, _ = example(12)
    hidden = tensors.pop("hidden").requires_grad_()
    head = Head(**{n: x.requires_grad_() for n, x in tensors.items()}, lora_scale=0.5, logit_scale=1.0, softcap=5.0)
    call = LinearCall.of(hidden, head, labels, budget=budget, backend=backend)
    assert all(call.needs)
    opcheck(linear_ops.linear_logps.definition, (), call.to_schema())
    _, _, *saved = linear_ops.linear_logps(**call.to_schema())
    plain = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in call.to_schema().items()}
    opcheck(linear_ops.linear_logps_backward.definition, (torch.ones(3, 6), [x.detach() for x in saved]), plain)


@pytest.mark.parametrize("budget", [2**30, 20_000])
def test_a_vocabulary_of_several_blocks_backward(budget):
    tensors, labels, _, upstream = example(13, 1, 3, 4, 2 * 2048 + 5, masked=0.0)
    plain, kernels = (
        run(linear_sequence_logps, tensors, labels, upstream, logits_budget=budget, backend=b) for b in BACKENDS
    )
    torch.testing.assert_close(kernels, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [("hidden",), ("bias",), ()])
def test_shapes_of_what_is_kept_where_little_is_trained(trained):
    tensors, labels, _, _ = example(12)
    for name in trained:
        tensors[name].requires_grad_()
    hidden = tensors.pop("hidden")
    call = LinearCall.of(
        hidden, Head(**tensors, lora_scale=0.5, logit_scale=1.0, softcap=5.0), labels, budget=2**30, backend="eager"
    )
    opcheck(linear_ops.linear_logps.definition, (), call.to_schema(), test_utils="test_faketensor")


def test_compiles_without_a_graph_break():
    tensors, labels, weights, upstream = example(13)
    function = torch.compile(linear_sequence_logps, fullgraph=True, backend="aot_eager")
    kwargs = {"token_weights": weights, "logits_budget": 2**20, "low_rank": True}
    expected = run(linear_sequence_logps, tensors, labels, upstream, **kwargs)
    torch.testing.assert_close(run(function, tensors, labels, upstream, **kwargs), expected)


def test_compiles_with_numbers_that_change():
    tensors, labels, _, upstream = example(17)
    function = torch.compile(linear_sequence_logps, fullgraph=True, backend="aot_eager")
    for softcap in (3.0, 4.0, 5.0):
        options = {"softcap": softcap, "logit_scale": 1 / softcap, "logits_budget": int(1000 * softcap)}
        expected = run(linear_sequence_logps, tensors, labels, upstream, **options)
        torch.testing.assert_close(run(function, tensors, labels, upstream, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 2**20])
def test_a_strided_bias(backend, budget):
    tensors, labels, _, upstream = example(16)
    strided = {**tensors, "bias": torch.stack([tensors["bias"], torch.full((37,), 99.0)], 1)[:, 0]}
    assert not strided["bias"].is_contiguous()
    options = {"backend": backend, "logits_budget": budget}
    expected = run(linear_sequence_logps, tensors, labels, upstream, **options)
    torch.testing.assert_close(run(linear_sequence_logps, strided, labels, upstream, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_touched(backend):
    tensors, labels, weights, upstream = example(14)
    before = {n: x.clone() for n, x in tensors.items()}
    run(linear_sequence_logps, tensors, labels, upstream, token_weights=weights, softcap=3.0, backend=backend)
    assert all(torch.equal(before[n], x) for n, x in tensors.items())


# Bad input

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)


class FakeDTensor(torch.Tensor):
    def full_tensor(self):
        return self


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden must be a non-empty \[N, T, D\] tensor, got shape \[3, 4\]"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a floating-point tensor, got torch.int64"),
        ({"hidden": HIDDEN.numpy()}, TypeError, "hidden must be a torch.Tensor, got ndarray"),
        ({"weight": WEIGHT.numpy()}, TypeError, "weight must be a torch.Tensor, got ndarray"),
        ({"weight": WEIGHT.long()}, TypeError, "weight must be a floating-point tensor, got torch.int64"),
        ({"bias": [0.0] * 5}, TypeError, "bias must be a torch.Tensor, got list"),
        (
            {"bias": torch.zeros(5, dtype=torch.int32)},
            TypeError,
            "bias must be a floating-point tensor, got torch.int32",
        ),
        ({"weight": LowRank(WEIGHT, [[0.0]], WEIGHT)}, TypeError, "lora_A must be a torch.Tensor, got list"),
        ({"weight": LowRank(WEIGHT, WEIGHT, 1.0)}, TypeError, "lora_B must be a torch.Tensor, got float"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"weight must have shape \[V, D\] with hidden's D = 4, got \[5, 3\]"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight must have hidden's dtype torch.float32, got torch.bfloat16"),
        ({"weight": WEIGHT.as_subclass(FakeDTensor)}, TypeError, r"weight is a DTensor.*napo_loss\.fused_head"),
        ({"weight": torch.empty(0)}, ValueError, r"weight is empty, shape \[0\], as a ZeRO-3.*napo_loss\.fused_head"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, but hidden is on cpu"),
        (
            {"weight": LowRank(WEIGHT, WEIGHT, WEIGHT)},
            ValueError,
            r"lora_A and lora_B must have shapes \[r, D\] and \[V, r\]",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[V\] = \[5\], got \[4\]"),
        ({"labels": LABELS[:, :2]}, ValueError, r"labels must have shape \[N, T\] = \[2, 3\], as hidden asks"),
        ({"labels": LABELS + 5}, ValueError, r"labels must be in \[0, 5\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number > 0, got 0.0"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be a finite number > 0, got -1.0"),
        ({"logits_budget": 0}, ValueError, "logits_budget must be a finite number > 0, got 0"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights must have shape \[2, 3\]"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton' or 'eager'"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"hidden must be a non-empty \[total, D\] tensor with cu_"),
        (
            {"hidden": HIDDEN[0], "labels": LABELS[0], "cu_seqlens": torch.tensor([0, 2])},
            ValueError,
            r"cu_seqlens must rise from 0 to total = 3, got \[0, 2\]",
        ),
        (
            {"hidden": HIDDEN[0], "labels": LABELS[0], "cu_seqlens": torch.tensor([0.0, 3.0])},
            TypeError,
            "cu_seqlens must be an int32 or int64 tensor, got torch.float32",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **change}
    with pytest.raises(error, match=message):
        linear_sequence_logps(*[arguments.pop(n) for n in ("hidden", "weight", "labels")], **arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_token_weights_are_not_differentiated(packed):
    tensors, labels, weights, _ = example(4)
    hidden, given = tensors["hidden"], {"cu_seqlens": torch.tensor([0, 5, 18])} if packed else {}
    if packed:
        hidden, labels, weights = hidden.flatten(0, 1), labels.flatten(), weights.flatten()
    for x in (hidden, weights):
        x.requires_grad_()
    out = linear_sequence_logps(hidden, tensors["weight"], labels, token_weights=weights, **given)
    assert out.sum.requires_grad
    assert not out.length.requires_grad
    out.sum.sum().backward()
    assert weights.grad is None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("budget", [1, 2**20])
def test_a_label_out_of_range_is_a_visible_nan_on_a_gpu(budget):
    tensors, labels, _, upstream = example(15, masked=0.0)
    labels[0, 1] = 99
    sums, _, grads = run(linear_sequence_logps, tensors, labels, upstream, backend="triton", logits_budget=budget)
    assert sums.isnan().tolist() == [True, False, False]
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "lora_A", "lora_B"])
def test_dtypes_that_are_no_numbers_by_themselves_are_refused(name, dtype, autocast):
    """Float8 and integer weights mean something with a scale only, which autocast does not know."""
    given = {"hidden": torch.ones(1, 3, 4), "weight": torch.ones(6, 4), "bias": torch.ones(6)}
    given |= {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}
    given[name] = given[name].to(dtype)
    head = LowRank(given["weight"], given["lora_A"], given["lora_B"])
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=rf"{name} must be .*{dtype}"),
    ):
        linear_sequence_logps(given["hidden"], head, torch.zeros(1, 3, dtype=torch.long), bias=given["bias"])


# A bound of the number of active positions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("budget", [3000, 2**30])
@pytest.mark.parametrize("extra", [0, 1, 30])
def test_a_bound_of_active_positions_changes_nothing(backend, low_rank, budget, extra):
    tensors, labels, _, upstream = example(11)
    labels[:, -1] = -100  # the last position is masked, whose place rows beyond the active ones might read
    tensors["hidden"][:, -2:] = torch.nan
    active = int((labels[:, 1:] != -100).sum())
    options = {"low_rank": low_rank, "logits_budget": budget, "backend": backend}
    exact = run(linear_sequence_logps, tensors, labels, upstream, **options)
    bounded = run(linear_sequence_logps, tensors, labels, upstream, max_active=active + extra, **options)
    torch.testing.assert_close(bounded, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 5])
def test_a_bound_beyond_the_only_position(backend, V):
    """Rows beyond the active ones read a position, and a label, that there is."""
    tensors, _, _, upstream = example(12, 1, 1, 4, V)
    labels, options = torch.zeros(1, 1, dtype=torch.long), {"shift": False, "backend": backend}
    exact = run(linear_sequence_logps, tensors, labels, upstream, **options)
    bounded = run(linear_sequence_logps, tensors, labels, upstream, max_active=4, **options)
    torch.testing.assert_close(bounded, exact, rtol=1e-5, atol=1e-6)


def test_more_active_positions_than_the_bound_are_a_visible_nan():
    tensors, labels, _, _ = example(11)
    active = int((labels[:, 1:] != -100).sum())
    found = linear_sequence_logps(tensors["hidden"], tensors["weight"], labels, max_active=active - 1)
    assert found.sum.isnan().all()
    # Those whose rows were all left out, and of weighted tokens, packed or not, each sequence in which one counts.
    weights = torch.ones_like(labels, dtype=torch.float32)
    cu_seqlens = torch.arange(len(labels) + 1) * labels.shape[1]
    for bound in (1, active // 2):
        given = {"max_active": bound, "token_weights": weights}
        found = linear_sequence_logps(tensors["hidden"], tensors["weight"], labels, **given)
        assert torch.equal(found.sum.isnan(), found.length > 0)
        flat = {"max_active": bound, "token_weights": weights.flatten(), "cu_seqlens": cu_seqlens}
        packed = linear_sequence_logps(tensors["hidden"].flatten(0, 1), tensors["weight"], labels.flatten(), **flat)
        assert torch.equal(packed.sum.isnan(), packed.length > 0)
    with pytest.raises(ValueError, match="max_active must be a finite number > 0"):
        linear_sequence_logps(tensors["hidden"], tensors["weight"], labels, max_active=0)


@pytest.fixture
def waits(monkeypatch):
    """What the host would wait for a GPU for: sizes and values that it asks of tensors."""
    seen = []
    for name in ("nonzero", "item", "tolist", "__bool__", "__int__", "__index__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, f=original, n=name: seen.append(n) or f(x))
    return seen


@pytest.mark.parametrize(("bound", "expected"), [(None, ["nonzero"]), (30, [])])
def test_with_a_bound_nothing_waits(monkeypatch, waits, bound, expected):
    monkeypatch.setattr(linear_ops.eager, "check_range", lambda *_: None)  # looks at labels where that is free
    tensors, labels, _, upstream = example(11)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    found = linear_sequence_logps(hidden, weight, labels, max_active=bound, logits_budget=3000)
    found.sum.backward(upstream)
    assert waits == expected
