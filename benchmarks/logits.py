"""Time and extra memory of sequence log-probs from logits, forward and backward, against what users would pick.

    python -m benchmarks logits [--quick]

Providers run side by side in one process on the same tensors; shapes are those of real models, with a contiguous
prompt masked so that a share c of the positions is active. Writes ``results/logits-<device>.csv`` and ``logits.md``
(``--quick``: only prints).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

import napo_loss
from benchmarks.measure import DEVICE, GPU, RESULTS, device_name, extra_bytes, file_name, times
from napo_loss import sequence_logps

SHAPES = {  # name: N, T, V
    "small": (4, 128, 8192),
    "LLaVA-1.5-7B": (4, 1024 if GPU else 256, 32064),
    "Llama-3-8B": (4, 2048 if GPU else 128, 128256),
}
ACTIVE = (0.05, 0.3, 1.0)


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


def run_logits(*, quick: bool) -> None:
    name = device_name()
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

        found = times(step)
        extra = extra_bytes(step, lambda x=logits: x.nbytes) if GPU else 0  # x.nbytes: the gradient it leaves
        rows.append([name, shape, N, T, V, "bfloat16", c, provider, *(f"{t:.3f}" for t in found), extra])
    for row in rows:
        print("{1:14} c={6:<5} {7:10} {9:>10} ms  ({8} .. {10})".format(*row))
    if not quick:
        write(name, rows)


def write(name: str, rows: list[list]) -> None:
    """The CSV of this device, and the Markdown table of medians that README holds."""
    header = ["device", "shape", "N", "T", "V", "dtype", "c", "provider", "p20_ms", "p50_ms", "p80_ms", "extra_bytes"]
    versions = f"torch {torch.__version__}; napo_loss {napo_loss.__version__}"
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file_name('logits')}.csv").open("w", newline="") as file:
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
    (RESULTS / "logits.md").write_text("\n".join(lines) + f"\n\n{versions}, median\n")
