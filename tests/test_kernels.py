"""The kernels as kernels: the fused objective against the plain one, guard bands, launch choices, compiled code."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import napo_loss as napo_loss_package
import processes
from apart import apart
from draws import examples, quick
from napo_loss import Negative, Recipe, SequenceLogps, napo_loss, reference, sequence_logps
from napo_loss.kernels.launch import BLOCK_BYTES, logits_launch, on_device
from napo_loss.kernels.linear_rows import BLOCK_V as LINEAR_BLOCK_V
from napo_loss.kernels.linear_rows import linear_rows
from napo_loss.kernels.logps_backward import _rows_start_alike
from napo_loss.logps import ops as logps_ops
from napo_loss.logps.calls import LogitsCall
from napo_loss.objective import loss as objective
from napo_loss.objective import ops as objective_ops
from napo_loss.objective.negatives import PreferenceBatch


def run_objective(monkeypatch, fused, dtype, pc, pr, refs, lengths, **kwargs):
    """All outputs and both gradients, from the kernel or from plain tensor operations."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: fused)
    pc, pr = (x.to(dtype, copy=True).requires_grad_() for x in (pc, pr))
    refs = [None if x is None else x.to(dtype) for x in refs]
    chosen, rejected = SequenceLogps(pc, lengths[0].to(dtype)), SequenceLogps(pr, lengths[1].to(dtype))
    out = napo_loss(chosen, rejected, *refs, **kwargs)
    upstream = torch.linspace(0.5, 2, pc.shape[0], dtype=out.losses.dtype)
    out.losses.backward(upstream)
    return [*out, out.q, out.weights, *out.moments, pc.grad, pr.grad]


@examples(60)
@given(
    seed=st.integers(0, 2**31), K=st.sampled_from([None, 1, 3, 5]), B=st.sampled_from([1, 4, 37, 1500]),
    has_reference=st.booleans(), average=st.booleans(), dynamic=st.booleans(), smooth=st.booleans(),
    sft=st.sampled_from([0.0, 0.3]), scale=st.sampled_from([1.0, 30.0, 1e4]),
    estimators=st.lists(st.sampled_from(["released", "paper", "moment"]), min_size=5, max_size=5),
    margins=st.lists(st.sampled_from(["sum", "mean"]), min_size=5, max_size=5),
)  # fmt: skip
@example(
    seed=356095577, K=None, B=37, has_reference=False, average=False, dynamic=False, smooth=False, sft=0.0, scale=1e4,
    estimators=["released"] * 5, margins=["sum"] * 5,
)  # fmt: skip
@example(
    seed=0, K=3, B=4, has_reference=True, average=False, dynamic=False, smooth=False, sft=0.0, scale=1.0,
    estimators=["released", "released", "moment", "released", "released"], margins=["mean"] * 5,
)  # fmt: skip
def test_fused_objective_is_the_plain_one(
    seed, K, B, has_reference, average, dynamic, smooth, sft, scale, estimators, margins
):
    g = torch.Generator().manual_seed(seed)
    rows = (B,) if K is None else (K, B)
    pc, pr = scale * torch.randn(B, generator=g), scale * torch.randn(rows, generator=g)
    refs = (scale * torch.randn(B, generator=g), scale * torch.randn(rows, generator=g))
    lengths = (torch.randint(1, 9, (B,), generator=g), torch.randint(1, 9, rows, generator=g))
    fixed = [None, None, None, 0.0, 0.3]
    negatives = {}
    for k in range(K or 1):
        alpha = {"sum": 0.01, "mean": 0.5}[margins[k]]
        negatives[str(k)] = Negative(alpha, margins[k], fixed[k], weight=0.2 + 0.1 * k, estimator=estimators[k])
    recipe = Recipe(
        negatives, weights="dynamic" if dynamic else "fixed", average_logps=average, sft_weight=sft, decay=0.5
    )
    history = torch.tensor([0.5, 700.0])[:, None].expand(2, K or 1)  # a mean and a mean square, in no order of memory
    previous = (history[:, 0] if K is None else history) if smooth else None
    kwargs = {"recipe": recipe, "previous_moments": previous}
    args = (pc, pr, refs if has_reference else (None, None), lengths)
    with pytest.MonkeyPatch.context() as patch:
        exact = run_objective(patch, False, torch.float64, *args, **kwargs)
        plain = run_objective(patch, False, torch.float32, *args, **kwargs)
        fused = run_objective(patch, True, torch.float32, *args, **kwargs)
    apart(exact, plain, fused)
    for a, b, c in zip(exact, plain, fused, strict=True):
        assert a.shape == b.shape == c.shape
        size = a.abs().max() + 1e-3
        assert (c - a).abs().max() / size <= 3 * (b - a).abs().max() / size + 3e-6


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "q_from", "fused"),
    [
        (True, torch.float32, "rank_means", True), (True, torch.bfloat16, "all_pairs", True),
        (False, torch.float32, "rank_means", False), (True, torch.float64, "rank_means", False),
        (True, torch.float32, "each_pair", False),
    ],
)  # fmt: skip
def test_what_the_objective_kernel_is_for(on_gpu, dtype, q_from, fused):
    """A GPU, at most float32, one q for each kind of negative."""
    batch = SimpleNamespace(logps=SimpleNamespace(policy_chosen=SimpleNamespace(is_cuda=on_gpu, dtype=dtype)))
    assert objective._can_fuse(batch, Recipe(q_from=q_from)) == fused


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_a_fully_masked_answer_has_a_mean_of_zero(monkeypatch, fused, average):
    """Its sum and its length are 0: an answer of mean 0, in q and in the loss, and nothing becomes infinite."""
    pc, pr = torch.tensor([-6.0, -3.0]), torch.tensor([-8.0, 0.0])
    refs, lengths = (
        (torch.tensor([-7.0, -5.0]), torch.tensor([-7.0, 0.0])),
        (torch.tensor([2, 4]), torch.tensor([4, 0])),
    )
    recipe = Recipe(Negative(0.5, "mean"), average_logps=average)
    losses, chosen, rejected, q, *_ = run_objective(
        monkeypatch, fused, torch.float32, pc, pr, refs, lengths, recipe=recipe
    )
    by_mean = torch.tensor([1.0 / 2 - -1.0 / 4, 2.0 / 4 - 0.0], dtype=torch.float64)
    psi = by_mean if average else torch.tensor([1.0 - -1.0, 2.0 - 0.0], dtype=torch.float64)
    expected = reference.noise_level(by_mean, 0.5)
    torch.testing.assert_close(q, expected.float().expand_as(q))
    torch.testing.assert_close(losses, reference.noise_aware_dpo_loss(psi, 0.1, expected.item()).float())
    torch.testing.assert_close((chosen - rejected), 0.1 * psi.float())


def test_fused_objective_meets_nan_as_the_plain_one(monkeypatch):
    pc = torch.tensor([float("nan"), -3.0])
    args = (pc, torch.zeros(2), (torch.zeros(2), torch.zeros(2)), (torch.ones(2), torch.ones(2)))
    for fused in (False, True):
        losses, *_, q, _, _, _, _, _ = run_objective(monkeypatch, fused, torch.float32, *args)
        assert losses.isnan().all()  # one q for the batch: what it was read from is lost for all
        assert q.isnan()


def test_fused_objective_in_two_halves(monkeypatch):
    """Around an all-reduce the same kernel runs twice; with one rank that changes nothing."""
    monkeypatch.setattr(objective, "_can_fuse", lambda *_: True)
    pc, pr = -20 * torch.rand(5), -20 * torch.rand(3, 5)
    whole = napo_loss(pc, pr, None, None)
    monkeypatch.setattr(objective, "mean_over_group", lambda means, *_, **__: means)
    monkeypatch.setattr(objective, "check_group", lambda *_: None)
    halves = napo_loss(pc, pr, None, None, process_group="a group of one")
    assert torch.equal(whole.losses, halves.losses)
    assert torch.equal(whole.q, halves.q)


def test_fused_objective_reads_strided_arguments(monkeypatch):
    """Columns of larger tensors, as a caller keeps a history."""
    logps, history = -50 * torch.rand(4, 8), torch.rand(2, 3, 5)
    args = (logps[:, 0], logps[:, 1:4].t(), logps[:, 4], logps[:, 5:8].t())
    outs = []
    for fused in (False, True):
        monkeypatch.setattr(objective, "_can_fuse", lambda *_, fused=fused: fused)
        outs.append(napo_loss(*args, recipe=Recipe(Negative(), decay=0.5), previous_moments=history[..., -1]))
    torch.testing.assert_close(outs[1].q, outs[0].q)
    torch.testing.assert_close(outs[1].losses, outs[0].losses)
    with pytest.raises(ValueError, match=r"the moments of the step before, \[2, 3\], got shape \[2, 3, 4\]"):
        napo_loss(*args, recipe=Recipe(Negative(), decay=0.5), previous_moments=torch.rand(2, 3, 4))


def test_a_second_folder_is_searched_only_where_the_link_is_missing():
    """What lies beside the package, tests and benchmarks, is no part of it."""
    folders = [Path(x) for x in napo_loss_package.__path__]
    assert len(folders) == (1 if (folders[0] / "kernels").is_dir() else 2)


def test_rows_are_written_wide_only_where_they_start_alike():
    """What compiled code takes for granted and the interpreter does not see: 16 bytes at a boundary in both tensors."""
    starts = (1, 40, 8, 1)  # from a boundary, then strides
    assert _rows_start_alike(starts, starts, 8)
    assert _rows_start_alike(starts, (9, 48, 16, 1), 8)
    for i in range(4):
        other = tuple(x + (i == k) for k, x in enumerate(starts))
        assert not _rows_start_alike(starts, other, 8)
        assert not _rows_start_alike(other, starts, 8)
    assert not _rows_start_alike((0, 8, 8, 2), (0, 8, 8, 2), 8)


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    """Triton's current device is that of PyTorch, which may be another GPU than the tensor's."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("switched", device.index))
    on = [SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index)) for index in (0, 1)]
    assert on_device(on[0]) == ("switched", 0)
    assert on_device(on[1]) is on_device(torch.zeros(1))
    with on_device(torch.zeros(1)):
        pass


@pytest.fixture
def guard_bands(monkeypatch):
    """Every buffer that a launcher allocates gets 64 sentinels on both sides, checked at the end."""
    empty, buffers = torch.empty, []

    def guarded(*size, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = empty(shape.numel() + 128, **kwargs).fill_(7)
        buffers.append(buffer)
        return buffer[64 : 64 + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: guarded(x.shape, dtype=x.dtype, device=x.device, **kw))
    yield buffers
    monkeypatch.undo()
    assert len(buffers) > 0
    for buffer in buffers:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


@pytest.mark.parametrize("V", [1, 50, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_kernels_stay_inside_their_buffers(guard_bands, V, dtype):
    labels = torch.randint(0, V, (3, 7))
    labels[0, :4] = -100
    schema = LogitsCall(torch.randn(3, 7, V).to(dtype), labels, torch.rand(3, 7), backend="triton").to_schema()
    _, _, normalizer = logps_ops.sequence_logps(**schema)
    logps_ops.sequence_logps_backward(torch.ones(3), normalizer, **schema)
    assert len(guard_bands) == 7


@pytest.mark.parametrize(("K", "B"), [(1, 1), (3, 5), (5, 1100)])
def test_objective_kernel_stays_inside_its_buffers(guard_bands, K, B):
    recipe = Recipe(weights="dynamic", average_logps=True)
    row, rows = (SequenceLogps(torch.randn(shape), torch.ones(shape)) for shape in ((B,), (K, B)))
    call = objective_ops.ObjectiveCall.of(PreferenceBatch.of(row, rows, row, rows, recipe), 0.1, recipe)
    objective_ops.objective(**call.to_schema())
    assert len(guard_bands) == 4


@given(st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([2, 4]), st.booleans())
def test_launches_cover_every_row(rows, V, itemsize, aligned):
    launch = logits_launch(rows, V, itemsize, aligned=aligned)
    assert launch.chunk % launch.block_v == 0
    assert launch.chunk * launch.splits >= V
    assert launch.chunk * (launch.splits - 1) < V  # no program without work
    assert launch.block_v * itemsize <= BLOCK_BYTES
    assert launch.num_warps in (1, 2, 4)
    assert launch.align == (16 // itemsize if aligned else 1)


@pytest.mark.parametrize("rows", [1, 64, 100_000])
def test_one_row_is_split_and_many_are_not(rows):
    splits = logits_launch(rows, 128256, 2, aligned=True).splits
    assert splits == (32 if rows <= 64 else 1)


@pytest.mark.parametrize("start", [0, 1])
def test_a_row_far_above_its_base_is_read_again(start):
    """The base is of the block that is read first, the last one; ``start`` 1: of elements beside whole blocks, too."""
    block = BLOCK_BYTES // 4
    row = torch.full((start + 3 * block + 5,), -50.0)
    row[start + block // 2] = 300.0
    logits = row[start:].view(1, 1, -1).requires_grad_()
    for label in (0, block // 2):
        labels = torch.full((1, 1), label)
        for backend in ("triton", "eager"):
            found = sequence_logps(logits, labels, shift=False, backend=backend).sum
            assert found.item() == (-350.0 if label == 0 else 0.0)
            (grad,) = torch.autograd.grad(found, logits)
            assert grad[0, 0, block // 2].item() == (-1.0 if label == 0 else 0.0)


def test_a_linear_row_that_is_read_again_is_all_that_is_read():
    V = 2 * LINEAR_BLOCK_V - 1
    storage = torch.full((1, V + 1), -50.0)
    storage[0, 5], storage[0, V] = 300.0, 1e30  # of somebody else
    targets = torch.zeros(1, dtype=torch.int64)
    hit, peak, log_total, _ = linear_rows(storage[:, :V], targets, None, bias=None, logit_scale=1.0, softcap=0.0)
    assert (hit.item(), peak.item(), log_total.item()) == (-350.0, 300.0, 0.0)


def test_split_rows_give_the_same_sums():
    labels = torch.zeros(1, 2, dtype=torch.long)
    logits = torch.randn(1, 2, 20_000)
    assert logits_launch(2, 20_000, 4, aligned=True).splits > 1
    kernel, plain = (sequence_logps(logits, labels, backend=b).sum for b in ("triton", "eager"))
    torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=1e-6)


COMPILED = {  # with float16, which differs from bfloat16 in its conversions, for one; what is read of AMD's is quick
    "quick": (["gfx942"], ["--without", "fp16"]),
    "all cases": (["sm_90"], []),
    "rest": (["sm_80", "sm_100", "sm_120", "gfx90a", "gfx950"], ["--without", "fp16"]),
}


@pytest.mark.parametrize("name", quick(["quick"], COMPILED))
def test_compiled_for_every_target_and_no_worse_than_committed(name):
    """Real machine code for every architecture."""
    for package in ("tqdm", "matplotlib"):  # of the benchmarks
        pytest.importorskip(package)
    targets, without = COMPILED[name]
    command = [sys.executable, "-m", "benchmarks", "static", "--check", "--targets", *targets, *without]
    done = processes.run(command, TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for target in targets:
        assert target in done.stdout


def test_no_target_is_left_out():
    pytest.importorskip("tqdm")
    from benchmarks.compiled import TARGETS

    assert {target for targets, _ in COMPILED.values() for target in targets} == set(TARGETS)
