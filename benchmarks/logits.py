"""Time and extra memory of sequence log-probs from logits, forward and backward, against what users would pick.

    python -m benchmarks logits [--quick]

Providers run side by side in one process on the same tensors; shapes are those of real models, with a contiguous
prompt masked so that a share c of the positions is active. Writes ``results/logits-<device>.csv`` and ``logits.md``
(``--quick``: only prints).
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import napo_loss
from napo_loss import sequence_logps

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = {  # name: N, T, V
    "small": (4, 128, 8192),
    "LLaVA-1.5-7B": (4, 1024 if GPU else 256, 32064),
    "Llama-3-8B": (4, 2048 if GPU else 128, 128256),
}
ACTIVE = (0.05, 0.3, 1.0)
SECONDS = 2.0  # of measuring per provider and shape


def providers() -> Iterator[tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]]:
    yield "napo_loss", lambda logits, labels: sequence_logps(logits, labels).sum

    def eager(logits, labels):
        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
        return (logps * (labels != -100)).sum(-1)

    yield "eager", eager
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        return

    def trl(logits, labels):
        logits, labels = logits[:, :-1], labels[:, 1:]
        return (selective_log_softmax(logits, labels.clamp_min(0)) * (labels != -100)).sum(-1)

    yield "trl", trl


def measure(step: Callable[[], object]) -> tuple[list[float], int]:
    """p20, p50 and p80 in milliseconds, and peak extra bytes (GPU only; 0 elsewhere)."""
    step()
    if GPU:
        import triton.testing

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        extra = torch.cuda.max_memory_allocated() - before
        p20, p50, p80 = triton.testing.do_bench(step, rep=500, quantiles=[0.2, 0.5, 0.8])  # pyright: ignore
        return [p20, p50, p80], extra
    times, deadline = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return [p20, statistics.median(times), p80], 0


def run_logits(*, quick: bool) -> None:
    name = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    jobs = [(shape, c, provider) for shape in shapes for c in ACTIVE for provider in providers()]
    rows = []
    for shape, c, (provider, function) in tqdm(jobs, unit="case", disable=None):
        N, T, V = shapes[shape]
        torch.manual_seed(0)
        logits = torch.randn(N, T, V, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(0, V, (N, T), device=DEVICE)
        labels[:, : round((1 - c) * T)] = -100

        def step(logits=logits, labels=labels, function=function):
            logits.grad = None
            function(logits, labels).sum().backward()

        times, extra = measure(step)
        rows.append([name, shape, N, T, V, "bfloat16", c, provider, *(f"{t:.3f}" for t in times), extra])
    for row in rows:
        print("{1:14} c={6:<5} {7:10} {9:>10} ms  ({8} .. {10})".format(*row))
    if not quick:
        write(name, rows)


def write(name: str, rows: list[list]) -> None:
    """The CSV of this device, and the Markdown table of medians that README holds."""
    header = ["device", "shape", "N", "T", "V", "dtype", "c", "provider", "p20_ms", "p50_ms", "p80_ms", "extra_bytes"]
    versions = f"torch {torch.__version__}; napo_loss {napo_loss.__version__}"
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with (folder / f"logits-{name.split(',')[0].replace(' ', '-')}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "versions"])
        writer.writerows([*row, versions] for row in rows)
    names = [provider for provider, _ in providers()]
    medians = {(row[1], row[6], row[7]): float(row[9]) for row in rows}
    lines = [f"| {name}; bfloat16, forward + backward | c | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for shape, (N, T, V) in SHAPES.items():
        for c in ACTIVE:
            cells = [f"{medians[shape, c, provider]:.1f} ms" for provider in names]
            lines.append(f"| {shape}: N={N}, T={T}, V={V} | {c} | {' | '.join(cells)} |")
    (folder / "logits.md").write_text("\n".join(lines) + f"\n\n{versions}, median\n")
