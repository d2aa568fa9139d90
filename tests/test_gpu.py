"""What only a GPU can show: every kernel against float64 at real vocabularies, launches, syncs, graphs, overflow."""

import shutil
import sys

import pytest
import torch
import torch.distributed as dist

import processes
from napo_loss import Recipe, VocabShard, linear_sequence_logps, napo_loss, reference, sequence_logps
from napo_loss.logps import gemm

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(N, T, V, dtype, masked=0.5):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(N, T, V, device="cuda", generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N, T), device="cuda", generator=g)
    return logits, labels.masked_fill(torch.rand(N, T, device="cuda", generator=g) < masked, -100)


def errors(function, logits, labels, exact):
    """Largest errors of the sums and of the gradient against ``exact``."""
    leaf = logits.detach().requires_grad_()  # no clone(): it would move the logits back onto the 16-byte grid
    sums = function(leaf, labels).sum
    sums.backward(torch.linspace(-2, 2, len(sums), device="cuda", dtype=sums.dtype))
    return (sums.double() - exact[0]).abs().max(), (leaf.grad.double() - exact[1]).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 50257, 128256, 256000])
@pytest.mark.parametrize("offset", [0, 1])
def test_no_worse_than_eager_of_the_same_dtype(dtype, V, offset):
    logits, labels = example(4, 17, V, dtype)
    buffer = torch.empty(logits.numel() + offset, dtype=dtype, device="cuda")  # off the 16-byte grid by one element
    view = buffer[offset:].view(logits.shape).copy_(logits.detach())
    leaf = view.double().requires_grad_()
    sums = reference.sequence_logps(leaf, labels).sum
    sums.backward(torch.linspace(-2, 2, 4, device="cuda", dtype=torch.float64))
    exact = (sums.detach(), leaf.grad)
    ours = errors(lambda x, y: sequence_logps(x, y, backend="triton"), view, labels, exact)
    eager = errors(lambda x, y: reference.sequence_logps(x.float(), y), view, labels, exact)
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine <= 1.1 * theirs + 1e-5


def test_more_than_two_to_the_31_elements():
    N, T, V = 2, 8400, 131072  # 2.2e9 bf16 logits, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    logits = torch.empty(N, T, V, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    labels = torch.full((N, T), -100, device="cuda")
    labels[:, -5:] = V - 1
    assert logits.numel() > 2**31
    out = sequence_logps(logits, labels)
    out.sum.sum().backward()
    tail = logits.detach()[:, -6:].double().requires_grad_()
    exact = reference.sequence_logps(tail, labels[:, -6:]).sum
    exact.sum().backward()
    torch.testing.assert_close(out.sum.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.grad[:, -6:].double(), tail.grad, rtol=1e-2, atol=1e-6)
    assert logits.grad[:, :-6].count_nonzero() == 0


def loss_of(logits, labels, reference_logps):
    chosen, rejected = sequence_logps(logits, labels).pairs(3)
    recipe = Recipe(weights="dynamic")
    return napo_loss(chosen, rejected, reference_logps[0], reference_logps[1:], recipe=recipe).losses


def kernels_in(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]


def test_three_launches_forward_and_two_backward():
    logits, labels = example(8, 33, 5003, torch.bfloat16)
    ref, upstream = torch.zeros(4, 2, device="cuda"), torch.ones(2, device="cuda")
    loss_of(logits, labels, ref).backward(upstream)  # compiles
    logits.grad = None
    losses = []
    forward = kernels_in(lambda: losses.append(loss_of(logits, labels, ref)))
    backward = kernels_in(lambda: torch.autograd.grad(losses[0], logits, upstream))
    assert len(forward) <= 3, forward
    assert len(backward) <= 2, backward


def test_no_host_sync():
    logits, labels = example(8, 33, 5003, torch.bfloat16)
    ref, upstream = torch.zeros(4, 2, device="cuda"), torch.ones(2, device="cuda")
    loss_of(logits, labels, ref).backward(upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(logits, labels, ref).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step):
    """The graph of a step, and what the step gave while it was captured: what replaying writes into."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


def test_cuda_graph_capture():
    logits, labels = example(8, 33, 5003, torch.float32)
    ref, upstream = torch.zeros(4, 2, device="cuda"), torch.ones(2, device="cuda")

    def step():
        losses = loss_of(logits, labels, ref)
        return losses, torch.autograd.grad(losses, logits, upstream)[0]

    graph, (losses, grad) = captured(step)
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    expected = step()
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(grad, expected[1])


def test_cuda_graph_capture_from_hidden_states():
    hidden = torch.randn(4, 33, 64, device="cuda", requires_grad=True)
    weight = torch.randn(5003, 64, device="cuda", requires_grad=True)
    _, labels = example(4, 33, 5003, torch.float32)

    def step():
        sums = linear_sequence_logps(hidden, weight, labels, max_active=100, logits_budget=2**24).sum
        return sums, *torch.autograd.grad(sums.sum(), (hidden, weight))

    graph, found = captured(step)
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile():
    logits, labels = example(8, 33, 5003, torch.bfloat16)
    ref = torch.zeros(4, 2, device="cuda")
    compiled = torch.compile(lambda x: loss_of(x, labels, ref).mean(), fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(logits), logits)
    (expected,) = torch.autograd.grad(loss_of(logits, labels, ref).mean(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-6)


def test_fused_objective_matches_the_plain_one():
    torch.manual_seed(0)
    for K, B, scale in ((1, 1, 1.0), (3, 64, 30.0), (5, 3000, 1e4)):
        pc, pr = (scale * torch.randn(s, device="cuda") for s in ((B,), (K, B)))
        results = []
        for dtype in (torch.float64, torch.float32):  # float64 takes the plain path
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (pc, pr)]
            out = napo_loss(*leaves, None, None, recipe=Recipe(weights="dynamic", sft_weight=0.1))
            out.losses.sum().backward()
            results.append([*out, out.q, out.weights, *(x.grad for x in leaves)])
        for exact, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-4 * scale * 0.1)


def test_a_label_out_of_range_is_a_visible_nan():
    logits, labels = example(2, 5, 100, torch.float32, masked=0.0)
    labels[0, 2] = 100
    assert sequence_logps(logits, labels).sum.isnan().tolist() == [True, False]


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_memcheck_is_clean():
    code = (
        "import torch; from napo_loss import sequence_logps, napo_loss\n"
        "for V in (1, 37, 50257):\n"
        "  for dtype in (torch.bfloat16, torch.float32):\n"
        "    x = torch.randn(4, 9, V, device='cuda', dtype=dtype, requires_grad=True)\n"
        "    y = torch.randint(0, V, (4, 9), device='cuda'); y[:, :3] = -100\n"
        "    c, r = sequence_logps(x, y).pairs()\n"
        "    napo_loss(c, r, None, None).losses.sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    # PyTorch's cache rounds allocations up, which would hide a read past the end.
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-c", code]
    done = processes.run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0, done.stdout[-3000:]


# The linear path


def linear_example(dtype, N=4, T=200, D=1024, V=32000, c=0.4):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, T, D, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(V, D, generator=g, device="cuda") * 3 / D**0.5).to(dtype)
    labels = torch.randint(0, V, (N, T), generator=g, device="cuda")
    labels[:, : round((1 - c) * T)] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def linear_step(hidden, weight, labels, function=linear_sequence_logps, **kwargs):
    out = function(hidden, weight, labels, **kwargs)
    upstream = torch.linspace(-1, 1, len(out.sum), device="cuda", dtype=out.sum.dtype)
    return out.sum.detach(), *torch.autograd.grad(out.sum, [hidden, weight], upstream)


@pytest.mark.parametrize("V", [32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [2**24, 2**34])
def test_linear_accuracy_and_determinism(dtype, V, budget):
    hidden, weight, labels = linear_example(dtype, V=V)
    options = {"softcap": 30.0, "logit_scale": 0.5}
    exact = linear_step(
        hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels,
        reference.linear_sequence_logps, **options,
    )  # fmt: skip
    plain = linear_step(hidden, weight, labels, reference.linear_sequence_logps, **options)
    ours = linear_step(hidden, weight, labels, logits_budget=budget, **options)
    again = linear_step(hidden, weight, labels, logits_budget=budget, **options)
    for a, b, p, e in zip(ours, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - e).norm() <= (p.double() - e).norm() + 1e-5 * e.norm()


def test_half_products_stay_float32_in_one_call():
    assert gemm._has_out_dtype("cuda", torch.bfloat16)
    assert gemm._has_out_dtype("cuda", torch.float16)


def test_linear_syncs_once(monkeypatch):
    """The number of active rows, and nothing else: every other copy to the host would raise here."""
    args = linear_example(torch.bfloat16)
    linear_step(*args, logits_budget=2**30)
    nonzero, calls = torch.Tensor.nonzero, []

    def allowed(x):
        calls.append(torch.cuda.set_sync_debug_mode("default"))
        try:
            return nonzero(x)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "nonzero", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_step(*args, logits_budget=2**30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 1


@pytest.mark.parametrize("budget", [2**26, 2**28])
def test_linear_memory_stays_within_the_budget(budget):
    hidden, weight, labels = linear_example(torch.bfloat16, T=512, V=128256, c=1.0)
    linear_step(hidden, weight, labels, logits_budget=budget)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_step(hidden, weight, labels, logits_budget=budget)
    gradients = hidden.nbytes + weight.nbytes
    rows = 4 * hidden.numel() * 4  # X, w·X, U and w·U in float32
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * budget + gradients + rows


def test_linear_under_inductor():
    hidden, weight, labels = linear_example(torch.bfloat16, V=5003)
    compiled = torch.compile(linear_sequence_logps, fullgraph=True)
    expected = linear_step(hidden, weight, labels, logits_budget=2**30)
    torch.testing.assert_close(linear_step(hidden, weight, labels, compiled, logits_budget=2**30), expected)


def test_packed_logits_on_the_gpu_need_no_sync():
    logits = torch.randn(40, 5003, device="cuda", requires_grad=True)
    labels = torch.randint(0, 5003, (40,), device="cuda")
    offsets = torch.tensor([0, 11, 11, 40], device="cuda")
    sequence_logps(logits, labels, cu_seqlens=offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sequence_logps(logits, labels, cu_seqlens=offsets)
        out.sum.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.length.tolist() == [10, 0, 28]


def one_of_two_halves(rank, store):
    """Two processes share the GPU and the vocabulary; gloo moves what they exchange over the host."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    logits, labels = example(4, 17, 50257, torch.bfloat16)
    half = slice(25129 * rank, 25129 * (rank + 1))  # the second is a column shorter
    whole = sequence_logps(logits, labels)
    whole.sum.backward(torch.linspace(-2, 2, 4, device="cuda"))
    local = logits.detach()[..., half].requires_grad_()
    shard = VocabShard(local, dist.group.WORLD, start=half.start, V=50257)
    split = sequence_logps(shard, labels)
    split.sum.backward(torch.linspace(-2, 2, 4, device="cuda"))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(local.grad, logits.grad[..., half], rtol=1e-2, atol=1e-6)

    hidden, weight, labels = linear_example(torch.bfloat16, V=50257)
    expected, *grads = linear_step(hidden, weight, labels)
    rows = weight.detach()[half].requires_grad_()
    found, *split_grads = linear_step(
        hidden, rows, labels, lambda h, w, y: linear_sequence_logps(h, shard._replace(local=w), y)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(split_grads, (grads[0], grads[1][half]), strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.01 * theirs.float().norm()


def test_a_vocabulary_split_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(one_of_two_halves, (str(tmp_path / "store"),), nprocs=2)
