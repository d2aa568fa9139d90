"""Sequence log-probs from logits, kernels (interpreted here) and eager path, against the float64 reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from draws import examples
from napo_loss import reference, sequence_logps
from napo_loss.logps import active

BACKENDS = ["eager", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**31)


def example(seed, N, T, V, dtype=torch.float32, masked=0.4, device="cpu"):
    """Logits, labels with about ``masked`` of them ignored, token weights, and an upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(N, T, V, generator=g)
    labels = torch.randint(0, V, (N, T), generator=g).masked_fill(torch.rand(N, T, generator=g) < masked, -100)
    weights = torch.rand(N, T, generator=g)
    upstream = torch.randn(N, generator=g)
    return logits.to(device, dtype), labels.to(device), weights.to(device), upstream.to(device)


def run(function, logits, labels, upstream, **kwargs):
    """``sum``, ``length`` and ``dlogits`` as float64."""
    logits = logits.detach().clone().requires_grad_()
    out = function(logits, labels, **kwargs)
    out.sum.backward(upstream.to(out.sum.dtype))
    return out.sum.detach().double(), out.length.double(), logits.grad


def assert_matches(logits, labels, upstream, *, backend, token_weights=None, shift=True):
    """The house rule: error against float64 at most the same-dtype eager error, and a small eps."""
    ours = run(sequence_logps, logits, labels, upstream, backend=backend, token_weights=token_weights, shift=shift)
    w64 = None if token_weights is None else token_weights.double()
    exact = run(reference.sequence_logps, logits.double(), labels, upstream, token_weights=w64, shift=shift)
    same = run(reference.sequence_logps, logits.float(), labels, upstream, token_weights=token_weights, shift=shift)
    sum_error = (same[0] - exact[0]).abs().max()
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=sum_error.item() + 1e-5)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-6, atol=1e-6)
    assert ours[2].dtype == logits.dtype
    # The gradient is rounded once, to the dtype of the logits (the interpreter truncates bf16: a whole ulp).
    ulp = torch.finfo(logits.dtype).eps if logits.dtype != torch.float32 else 2e-6
    bound = ulp * exact[2].abs() + 2e-6 * upstream.abs().max() + torch.finfo(logits.dtype).smallest_normal
    assert ((ours[2].double() - exact[2]).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@examples(25)
@given(
    seeds, st.integers(1, 4), st.integers(1, 7), st.sampled_from([1, 2, 3, 15, 16, 17, 1000, 4096, 5003, 9001]),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4, 0.9, 1.0]),
)  # fmt: skip
def test_matches_the_reference(backend, dtype, seed, N, T, V, shift, weighted, masked):
    logits, labels, weights, upstream = example(seed, N, T, V, dtype, masked)
    token_weights = weights if weighted else None
    assert_matches(logits, labels, upstream, backend=backend, token_weights=token_weights, shift=shift)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # time first
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # vocabulary not innermost
        lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],  # a slice, off the 16-byte grid
        lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],  # padded rows
        lambda x: torch.cat([x, x], 2)[..., ::2],  # every other logit
        lambda x: x[:1].expand(x.shape),  # stride 0
    ],
)
def test_any_strides(backend, label_dtype, view):
    logits, labels, weights, upstream = example(0, 3, 4, 37)
    logits, weights = view(logits), weights.T.contiguous().T
    labels = labels.to(label_dtype).T.contiguous().T
    expected = run(reference.sequence_logps, logits.double(), labels, upstream, token_weights=weights.double())
    leaf = logits.detach().requires_grad_()  # the view itself: clone() would straighten it
    out = sequence_logps(leaf, labels, token_weights=weights, backend=backend)
    out.sum.backward(upstream)
    torch.testing.assert_close(out.sum.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_masked_rows_are_never_read_and_get_exactly_zero(backend, poison):
    logits, labels, weights, upstream = example(1, 3, 6, 50)
    clean = run(sequence_logps, logits, labels, upstream, backend=backend)
    masked = torch.ones(3, 6, dtype=torch.bool)
    masked[:, :-1] = labels[:, 1:] == -100  # the last position predicts nothing
    dirty = run(sequence_logps, logits.masked_fill(masked[..., None], poison), labels, upstream, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert (dirty[2][masked] == 0).all()
    weights = weights.masked_fill(labels == -100, float("nan"))
    assert torch.isfinite(sequence_logps(logits, labels, token_weights=weights, backend=backend).sum).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_masked_sequence_counts_nothing(backend):
    logits, labels, _, upstream = example(2, 3, 5, 20)
    labels[1] = -100
    out = sequence_logps(logits, labels, backend=backend)
    assert out.sum[1] == out.length[1] == out.mean[1] == 0
    grad = run(sequence_logps, logits, labels, upstream, backend=backend)[2]
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_sequences_longer_than_a_tile(weighted, shift):
    """What adds up takes 512 positions at a time: what one tile found stays when the next is read."""
    from napo_loss.kernels.logps_forward import Partials
    from napo_loss.kernels.logps_reduce import BLOCK_T, logps_reduce

    N, T, V = 2, BLOCK_T["long"] + 9, 4
    logits, labels, weights, _ = example(3, N, T, V)
    labels[1, BLOCK_T["long"] - 3 :] = -100  # nothing in the second tile
    given = {"token_weights": weights} if weighted else {}
    x, target = logits.view(1, N * T, V), labels.roll(-shift, 1).clamp_min(0).view(-1, 1)
    partials = Partials(x.amax(-1), (x - x.amax(-1, True)).exp().sum(-1), x[0].gather(-1, target)[:, 0])
    sums, lengths, _ = logps_reduce(partials, labels, weights if weighted else None, shift, -100)
    exact = reference.sequence_logps(logits.double(), labels, shift=bool(shift), **given)
    torch.testing.assert_close(sums.double(), exact.sum, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(lengths.double(), exact.length.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_token_weights_are_not_differentiated(backend, packed):
    logits, labels, weights, _ = example(4, 2, 5, 7)
    given = {"cu_seqlens": torch.tensor([0, 4, 10])} if packed else {}
    if packed:
        logits, labels, weights = logits.flatten(0, 1), labels.flatten(), weights.flatten()
    plain = sequence_logps(logits, labels, token_weights=weights, backend=backend, **given)
    for x in (logits, weights):
        x.requires_grad_()
    out = sequence_logps(logits, labels, token_weights=weights, backend=backend, **given)
    assert out.sum.requires_grad
    assert not out.length.requires_grad
    assert torch.equal(out.sum, plain.sum)
    assert torch.equal(out.length, plain.length)
    out.sum.sum().backward()
    assert weights.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.floats(-50, 50))
@examples(15)
def test_a_constant_added_to_a_row_changes_nothing(backend, seed, constant):
    logits, labels, _, upstream = example(seed, 2, 4, 30)
    moved = run(sequence_logps, logits + constant, labels, upstream, backend=backend)
    for a, b in zip(run(sequence_logps, logits, labels, upstream, backend=backend), moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.integers(0, 4))
@examples(15)
def test_padding_and_order_change_nothing(backend, seed, pad):
    logits, labels, weights, upstream = example(seed, 3, 5, 21)
    base = run(sequence_logps, logits, labels, upstream, backend=backend, token_weights=weights)
    order = torch.tensor([2, 0, 1])
    wide = [
        torch.nn.functional.pad(logits, (0, 0, 0, pad), value=7.0)[order],
        torch.nn.functional.pad(labels, (0, pad), value=-100)[order],
        upstream[order],
    ]
    weights = torch.nn.functional.pad(weights, (0, pad))[order]
    padded = run(sequence_logps, *wide, backend=backend, token_weights=weights)
    torch.testing.assert_close(padded[0], base[0][order], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(padded[2][:, :5], base[2][order], rtol=1e-6, atol=1e-6)
    assert (padded[2][:, 5:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    logits, labels, _, upstream = example(3, 2, 4, 40, masked=0.0)
    logits = logits * 1e4
    assert_matches(logits, labels, upstream, backend=backend)
    forbidden = torch.arange(40) % 3 == 0  # a vocabulary mask
    logits = logits.masked_fill(forbidden, float("-inf"))
    labels = labels // 3 * 3 + 1
    sums, _, grad = run(sequence_logps, logits, labels.clamp(max=38), upstream, backend=backend)
    assert torch.isfinite(sums).all()
    assert (grad[..., forbidden] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bit_identical(backend):
    args = example(4, 4, 6, 5003, torch.bfloat16)
    first = run(sequence_logps, args[0], args[1], args[3], backend=backend)
    for _ in range(3):
        again = run(sequence_logps, args[0], args[1], args[3], backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_float64_and_gradcheck():
    logits, labels, weights, _ = example(5, 2, 3, 7, torch.float64)
    assert gradcheck(
        lambda x: sequence_logps(x, labels, token_weights=weights.double()).sum, (logits.requires_grad_(),)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 37, 5003])
def test_no_write_outside_any_buffer(backend, dtype, V):
    """Every tensor that is written sits between guard bands; forward must not write its inputs at all."""
    logits, labels, weights, upstream = example(6, 2, 3, V, dtype)
    band, size = 64, logits.numel()
    buffer = torch.full((size + 2 * band,), 3.0, dtype=dtype)
    inner = buffer[band : band + size].view(logits.shape)
    inner.copy_(logits)
    leaf = inner.requires_grad_()
    out = sequence_logps(leaf, labels, token_weights=weights, inplace_backward=True, backend=backend)
    assert torch.equal(leaf, logits)
    (grad,) = torch.autograd.grad(out.sum, leaf, upstream)
    assert grad.data_ptr() == inner.data_ptr()  # written where it was asked to
    expected = run(sequence_logps, logits, labels, upstream, token_weights=weights, backend=backend)[2]
    assert torch.equal(grad, expected)
    assert (buffer.detach()[:band] == 3).all()
    assert (buffer.detach()[band + size :] == 3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_touched_unless_asked(backend):
    logits, labels, weights, upstream = example(7, 2, 3, 11)
    before = [x.clone() for x in (logits, labels, weights)]
    run(sequence_logps, logits, labels, upstream, token_weights=weights, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, labels, weights), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_backward_writes_over_the_logits(backend, packed, inplace):
    logits, labels, _, _ = example(5, 2, 4, 9, masked=0.2)
    given = {"cu_seqlens": torch.tensor([0, 3, 8])} if packed else {}
    leaf, labels = (logits.flatten(0, 1), labels.flatten()) if packed else (logits, labels)
    x = leaf.requires_grad_() * 1
    sequence_logps(x, labels, inplace_backward=inplace, backend=backend, **given).sum.sum().backward()
    assert torch.equal(x, leaf.grad if inplace else leaf)
    assert leaf.grad.abs().sum() > 0


def test_inplace_backward_cannot_be_run_twice():
    logits, labels, _, _ = example(8, 2, 3, 11)
    leaf = logits.clone().requires_grad_()
    loss = sequence_logps(leaf * 1, labels, inplace_backward=True).sum.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mask", ["completion", "every other"])
def test_eager_memory_is_bounded(monkeypatch, mask):
    """However long the batch, no upcast copy holds more than a chunk of active rows, of a view or of a gather."""
    chunks = []
    made = active.ActiveRows.chunks

    def watched(*given):
        for chunk in made(*given):
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(active, "CHUNK_BYTES", 3 * 50 * 4)
    monkeypatch.setattr(active.ActiveRows, "chunks", watched)
    logits, labels, _, upstream = example(9, 4, 9, 50, torch.bfloat16)
    counts = torch.arange(9) >= 4 if mask == "completion" else torch.arange(9) % 2 == 0
    labels = labels.masked_fill(labels == -100, 1).where(counts, -100)
    assert_matches(logits, labels, upstream, backend="eager")
    sizes = [chunk.rows.stop - chunk.rows.start for chunk in chunks]
    assert max(sizes) == 3
    assert all(chunk.z.untyped_storage().nbytes() == 3 * 50 * 4 for chunk in chunks)
    assert sum(sizes) == 2 * (labels[:, 1:] != -100).sum()
    assert {type(chunk.at[1]) for chunk in chunks} == {slice if mask == "completion" else torch.Tensor}


# Bad input

LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, r"logits must be a torch.Tensor, got list"),
        ({"logits": LOGITS[0]}, ValueError, r"logits must be a non-empty \[N, T, V\] tensor, got shape \[3, 5\]"),
        ({"logits": LOGITS[:0]}, ValueError, r"non-empty \[N, T, V\] tensor, got shape \[0, 3, 5\]"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be a floating-point tensor, got torch.int64"),
        ({"logits": LOGITS.to(torch.float8_e4m3fn)}, TypeError, "logits must be float32, bfloat16, float16 or"),
        ({"labels": LABELS.tolist()}, TypeError, r"labels must be a torch.Tensor, got list"),
        ({"labels": LABELS[:, :2]}, ValueError, r"labels must have shape \[N, T\] = \[2, 3\].*, got \[2, 2\]"),
        ({"labels": LABELS.float()}, TypeError, "labels must be int64 or int32, got torch.float32"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta, but logits is on cpu"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights must have shape \[2, 3\].*, got \[2\]"),
        ({"token_weights": LABELS}, TypeError, "token_weights must be a floating-point tensor"),
        (
            {"logits": LOGITS[:1].expand(2, 3, 5), "inplace_backward": True},
            ValueError,
            "got an expanded tensor of shape",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton' or 'eager', got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": LOGITS, "labels": LABELS, **change}
    with pytest.raises(error, match=message):
        sequence_logps(arguments.pop("logits"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("wrong", [-1, 5, -101, 2**40])
def test_a_label_out_of_range_is_an_error_or_a_visible_nan(wrong):
    logits, labels, _, _ = example(10, 2, 3, 5, masked=0.0)
    labels[0, 1] = wrong
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\) or -100 \(ignored\), got {wrong}"):
        sequence_logps(logits, labels)
    # What a GPU does, where looking at the labels would cost a sync: the sequence shows it, its neighbour not.
    out = sequence_logps(logits, labels, backend="triton")
    assert out.sum.isnan().tolist() == [True, False]


def test_missing_triton_is_named(monkeypatch):
    from napo_loss import backend

    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(ImportError, match=r'pip install triton, or ask for the eager path with backend="eager"'):
        sequence_logps(LOGITS, LABELS, backend="triton")
    assert sequence_logps(LOGITS, LABELS).sum.shape == (2,)
