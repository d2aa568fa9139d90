"""The products of the linear path as a GPU gets them: which operands, where they start, what is done around them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draws import examples
from napo_loss import LowRank, linear_sequence_logps
from napo_loss.logps import gemm, memory

BF16 = "allow_bf16_reduced_precision_reduction"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Half-precision products with results in float32, or rounded once, as cuBLAS has them; their operands are kept."""
    operands, product = [], torch.mm

    def mm(a, b, *, out_dtype=None, out=None):
        operands.append((a, b, out))
        whole = not getattr(torch.backends.cuda.matmul, BF16)
        assert out is None or out.dtype == torch.float32 or whole, "parts of a sum may be rounded"
        found = product(a.float(), b.float())
        return found.to(out_dtype or a.dtype) if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(gemm, "_has_out_dtype", lambda *_: True)
    for module in (gemm, memory):
        monkeypatch.setattr(module, "rounds_once", lambda *_: True)
    return operands


def aligned(x):
    """As cuBLAS asks: an address, and the step from one row or column to the next, that 16 bytes divide."""
    rows, columns = x.stride()
    step = rows if columns == 1 else columns
    return min(x.stride()) <= 1 and x.data_ptr() % 16 == 0 and (step * x.itemsize) % 16 == 0


def test_half_precision_is_multiplied_as_it_is_only_where_sums_are_rounded_once(monkeypatch):
    multiplied, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **given: multiplied.append(a.dtype) or product(a, b, **given))
    monkeypatch.setattr(gemm, "_has_out_dtype", lambda *_: False)
    a, b = torch.randn(4, 3).bfloat16(), torch.randn(3, 8).bfloat16()
    gemm.mm_into(out := torch.empty(4, 8, dtype=torch.bfloat16), a, b)
    assert set(multiplied) == {torch.float32}
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


@pytest.mark.parametrize("budget", [2**30, 150_000], ids=["kept", "computed again"])
@pytest.mark.parametrize("V", [1024, 5003])
@pytest.mark.parametrize("low_rank", [False, True])
def test_operands_are_aligned(as_on_a_gpu, V, budget, low_rank):
    N, T, D, r = 3, 70, 64, 8
    hidden = torch.randn(N, T, D).bfloat16().requires_grad_()
    weight, lora_A, lora_B = (torch.randn(s).bfloat16().requires_grad_() for s in ((V, D), (r, D), (V, r)))
    labels = torch.randint(0, V, (N, T))
    head = LowRank(weight, lora_A, lora_B, 2.0) if low_rank else weight
    linear_sequence_logps(hidden, head, labels, logits_budget=budget).sum.sum().backward()
    large = [x for operands in as_on_a_gpu for x in operands if x is not None and x.dtype == torch.bfloat16]
    assert len(large) > 6
    for x in large:
        assert aligned(x), (x.shape, x.stride())
    for _, _, out in as_on_a_gpu:
        assert out is None or aligned(out)
    kept = budget == 2**30
    rounded = [out for _, _, out in as_on_a_gpu if out is not None and out.dtype == torch.bfloat16]
    assert (len(rounded) == 1 + low_rank) == kept  # the gradients of the factors, in one product each


def test_the_gradient_of_the_head_is_rounded_once(as_on_a_gpu):
    """Straight into its dtype, and the same as the float32 sums."""
    a, b = torch.randn(64, 48).bfloat16(), torch.randn(48, 32).bfloat16()
    out = torch.empty(64, 32, dtype=torch.bfloat16)
    before = getattr(torch.backends.cuda.matmul, BF16)
    gemm.mm_into(out, a, b)
    assert getattr(torch.backends.cuda.matmul, BF16) == before
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())
    assert as_on_a_gpu[-1][2] is out


@pytest.mark.parametrize("setting", [True, False, (False, False)])
def test_the_setting_of_whoever_trains_is_as_it_was(as_on_a_gpu, setting):
    flags = torch.backends.cuda.matmul
    names = [name for name in (BF16, f"{BF16}_split_k") if hasattr(flags, name)]
    if setting == (False, False) and len(names) == 1:
        pytest.skip("this torch has one switch")
    before = [getattr(flags, name) for name in names]
    try:
        setattr(flags, BF16, setting)
        given_ = [getattr(flags, name) for name in names]
        with pytest.raises(RuntimeError):
            gemm.mm_into(torch.empty(2, 2).bfloat16(), torch.ones(2, 3).bfloat16(), torch.ones(2, 2).bfloat16())
        gemm.mm_into(torch.empty(2, 2).bfloat16(), torch.ones(2, 3).bfloat16(), torch.ones(3, 2).bfloat16())
        assert [getattr(flags, name) for name in names] == given_
    finally:
        setattr(flags, BF16, tuple(before) if len(before) > 1 else before[0])


@examples(100)
@given(st.integers(0, 5000), st.integers(0, 1000), st.sampled_from(["cpu", "cuda"]))
def test_chunks_are_balanced(size, most, device_type):
    tile = {"cpu": gemm.CPU_TILE, "cuda": gemm.TILE}[device_type]
    found = gemm.balanced(size, most, device_type)
    widths = [x.stop - x.start for x in found]
    assert [i for x in found for i in (x.start, x.stop)][1:-1] == [i for x in found[1:] for i in (x.start, x.start)]
    assert sum(widths) == size
    assert all(0 < width <= max(1, most) for width in widths)
    if most >= tile:
        assert all(x.start % tile == 0 for x in found)
        assert len(found) <= -(-size // (most // tile * tile))
    if len(widths) > 1:
        assert max(widths) - min(widths) <= len(widths) * (tile if most >= tile else 1)


@pytest.mark.parametrize("A", [1, 100, 3000])
def test_columns_are_cut_between_tiles(A):
    h = torch.empty(A, 3584, dtype=torch.bfloat16)
    for kept in (True, False):
        columns = memory.columns_at_a_time(h, 128256, 512 * 2**20, kept=kept)
        assert columns % gemm.TILE == 0


@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 1000), (torch.float64, 1000), (torch.bfloat16, 256)])
def test_what_is_kept_needs_blocks_only_where_results_are_rounded(dtype, columns):
    """On a CPU, half precision: float32 results of as many columns as the memory has room for wait to be rounded."""
    h = torch.empty(10, 64, dtype=dtype)
    assert memory.columns_at_a_time(h, 1000, 4 * 64 * 256, kept=True) == columns
