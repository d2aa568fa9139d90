"""The formulas of docs/memory.md are what steps allocate, its tables and sentences are those of the formulas."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import linear, memory
from benchmarks.linear_providers import eager, liger, ours, trl_fused_head
from benchmarks.memory import CPU, CUDA, PATHS, Step
from benchmarks.shapes import MODELS, Shape
from draws import quick
from napo_loss.logps import factored, gemm
from napo_loss.logps import memory as budgets

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/memory.md").read_text()
GPU = torch.cuda.is_available()
DEVICE = CUDA if GPU else CPU
SHAPES = [Shape("V large", 2, 513, 256, 6016, (0.3, 1.0)), Shape("D large", 4, 257, 512, 4096, (1.0,))]
QUICK = (SHAPES[1], 1.0)
CASES = quick([QUICK], [(shape, c) for shape in SHAPES for c in shape.active])
PROVIDERS = {
    "eager": eager,
    "Liger": partial(liger, compiled=False),
    "Liger, compiled": partial(liger, compiled=True),
    "TRL fused head": trl_fused_head,
    "napo_loss, from logits": memory.sequence_logps_of_logits,
    "napo_loss, from logits, in place": partial(memory.sequence_logps_of_logits, inplace=True),
}
NEEDS = {"Liger": "liger_kernel", "Liger, compiled": "liger_kernel", "TRL fused head": "trl.kernels"}
SMALL = 2**17  # bytes of what formulas leave out: a few numbers for each row
pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers, and of what the profiler cannot trace


def measured(provider, shape, dtype, c):
    hidden, weight = (x.requires_grad_() for x in linear.make_inputs(shape, dtype, 1)[0])
    labels = linear.make_labels(shape, c)

    def step():
        loss, _ = provider(hidden, weight, labels)
        return torch.autograd.grad(loss, [hidden, weight])

    step()
    return memory.allocated(step)


def check(peak, formula):
    assert formula - SMALL <= peak <= 1.01 * formula + SMALL, f"{peak / formula:.3f} of the formula"


def given(name):
    module = NEEDS.get(name, "torch")
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    return PROVIDERS[name]


def test_what_is_allocated_is_counted_to_the_byte():
    def step():
        x = torch.ones(1000, 100, device="cuda" if GPU else "cpu")  # 400 kB, and as much again, and half
        return (x + 1)[:500].clone()

    step()
    assert memory.allocated(step) == pytest.approx(800_000 + 200_000, rel=0.01)


@pytest.mark.parametrize("name", quick(["eager", "Liger"], sorted(PROVIDERS.keys() - {"Liger, compiled"})))
@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_a_step_in_float32_allocates(name, case):
    shape, c = case
    check(measured(given(name), shape, "float32", c), PATHS[name](Step(*shape[1:5], c, 4), DEVICE))


@pytest.mark.parametrize(
    "name", quick(["napo_loss, from logits"], ["eager", "Liger", "TRL fused head", "napo_loss, from logits"])
)
def test_the_formula_is_what_a_step_in_bfloat16_allocates(name):
    shape = SHAPES[0]
    check(measured(given(name), shape, "bfloat16", 1.0), PATHS[name](Step(*shape[1:5], 1.0), DEVICE))


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="read off on a CPU; on a GPU the compiler does otherwise")
def test_the_compiled_liger_allocates_on_a_cpu_what_the_page_says(monkeypatch):
    shape = SHAPES[1]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()
    check(measured(given("Liger, compiled"), shape, "bfloat16", 1.0), memory.liger_compiled(Step(*shape[1:5], 1.0)))


BUDGETS = [2**22, 2**24, 2**30]  # dlogits are made again, or kept where they are few, or always


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("case", CASES)
def test_from_hidden_states_in_float32(case, budget):
    shape, c = case
    peak = measured(partial(ours, budget=budget), shape, "float32", c)
    check(peak, memory.from_hidden(Step(*shape[1:5], c, 4), DEVICE, budget=budget))


def in_pieces(a, b, out=None):
    """A product that sums in float32 and takes nothing beside its result, as a GPU's."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32) if out is None else out
    for rows in gemm.blocks(a.shape[0], 128):
        for columns in gemm.blocks(b.shape[1], 128):
            out[rows, columns] = a[rows].float() @ b[:, columns].float()
    return out


@pytest.mark.parametrize("budget", quick([2**22], BUDGETS))
@pytest.mark.parametrize("case", CASES)
def test_from_hidden_states_in_bfloat16_with_the_products_of_a_gpu(case, budget, monkeypatch):
    shape, c = case
    if not GPU:
        monkeypatch.setattr(factored, "mm_float32", in_pieces)
        monkeypatch.setattr(factored, "mm_into", lambda out, a, b: in_pieces(a, b, out))
        monkeypatch.setattr(budgets, "rounds_once", lambda device: True)
    peak = measured(partial(ours, budget=budget), shape, "bfloat16", c)
    formula = memory.from_hidden(Step(*shape[1:5], c), DEVICE, budget=budget)
    assert formula - SMALL <= peak <= 1.01 * formula + 6 * SMALL  # the pieces


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(PATHS.keys() - {"Liger, compiled"}))
@pytest.mark.parametrize("c", [0.3, 1.0])
def test_on_a_gpu_at_a_real_vocabulary(name, c):
    shape = Shape("Llama-3-8B", 2, 1024, *MODELS["Llama-3-8B"][:2], (c,))
    budget = {"napo_loss, from hidden states, dlogits kept": 2**60, "napo_loss, from hidden states": CUDA.scratch}
    provider = partial(ours, budget=budget[name]) if name in budget else given(name)
    assert measured(provider, shape, "bfloat16", c) == pytest.approx(PATHS[name](Step(*shape[1:5], c)), rel=0.05)


def test_tables_are_those_of_the_formulas():
    for name in memory.NAMES:
        assert memory.table(name) in PAGE, "run python -m benchmarks.memory"
        assert memory.table(name) in (ROOT / "benchmarks/results/memory.md").read_text()
    assert (ROOT / "benchmarks/results/memory.png").stat().st_size > 10_000


def test_the_page_names_the_versions_it_was_counted_from():
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, package in (("torch", "torch"), ("liger-kernel", "liger-kernel"), ("TRL", "trl")):
        assert f"{name} {versions[package]}" in PAGE


def gib(name, path, T, c):
    return PATHS[path](Step(2, T, *MODELS[name][:2], c)) / 2**30


def test_the_sentences_of_the_page():
    V = MODELS["Qwen2.5-VL-7B"].V
    assert f"{2 * 8192 * V / 1e9:.1f} billion logits: {2 * 8192 * V * 2 / 2**30:.2f} GiB" in " ".join(PAGE.split())
    everywhere = [(T, c) for T in memory.LENGTHS for c in memory.SHARES]
    hidden, inplace = "napo_loss, from hidden states", "napo_loss, from logits, in place"
    for T, c in everywhere:
        if T <= 4096:
            assert gib("LLaVA-1.5-7B", inplace, T, c) <= gib("LLaVA-1.5-7B", hidden, T, c)
    for c in memory.SHARES:
        assert gib("LLaVA-1.5-7B", "TRL fused head", 16384, c) < 1.15 * gib("LLaVA-1.5-7B", hidden, 16384, c)
    large = memory.NAMES[1:]
    share = [gib(name, hidden, T, c) / gib(name, "TRL fused head", T, c) for name in large for T, c in everywhere]
    low, high = re.findall(r"takes (\d\.\d+) to (\d\.\d+) of it", " ".join(PAGE.split()))[0]
    assert (f"{min(share):.2f}", f"{max(share):.2f}") == (low, high)
    assert "512 MiB" in PAGE
    assert CUDA.scratch == 512 * 2**20


@pytest.mark.parametrize(("T", "c"), [(4096, 0.3), (16384, 1.0)])
def test_the_short_formulas_of_the_page_are_those_of_the_file(T, c):
    """Where the page leaves out what is small: within 1 %."""
    s = Step(2, T, *MODELS["Llama-3-8B"][:2], c)
    n, h, w, AD, VD = s.logits, s.hidden, s.head, s.active * s.D, s.V * s.D
    short = {
        "eager": 12 * n,
        "Liger": 14 * n + w + h,
        "Liger, compiled": 8 * n + w + h,
        "TRL fused head": 8 * AD + 6 * VD + 65536 * min(s.active, 4096),
        "napo_loss, from logits": max(4 * n, 2 * n + h + w),
        "napo_loss, from logits, in place": 2 * n + h + w,
        "napo_loss, from hidden states": 6 * AD + h + w + 2**29,
    }
    for name, formula in short.items():
        assert formula == pytest.approx(PATHS[name](s), rel=0.01), name
    for written in ("$12\\,n$", "$14\\,n_2 + w + h$", "$8\\,n_2 + w + h$", "$8AD + 6VD + 65536\\,\\min(A, 4096)$",
                    "$\\max(4\\,n,\\ 2\\,n + h + w)$", "$2\\,n + h + w$", "$6AD + h + w + s$"):  # fmt: skip
        assert written in PAGE
