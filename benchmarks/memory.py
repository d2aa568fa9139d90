"""Peak memory of head and loss in one step, as formulas that tests compare with what steps allocate: docs/memory.md.

``python -m benchmarks.memory`` writes tables and figure. A peak is what is there at once beyond hidden states and head,
the gradients of both included. Numbers of a row (log-probs, normalizers) are left out: a few bytes beside V.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.linear_providers import dpo
from benchmarks.machine import ROOT
from benchmarks.measure import GPU, Peak
from benchmarks.shapes import MODELS
from napo_loss import sequence_logps
from napo_loss.logps.active import CHUNK_BYTES
from napo_loss.logps.gemm import TILE, balanced
from napo_loss.logps.memory import SCRATCH

NAMES = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B", "Llama-3-8B")
LENGTHS = (2048, 4096, 8192, 16384)
SHARES = (0.3, 1.0)
FULL = 4  # bytes of a float32


class Step(NamedTuple):
    """What a step works on, labels as :func:`benchmarks.logits.make_labels` makes them."""

    N: int
    T: int
    D: int
    V: int
    c: float
    element: int = 2  # bytes of a hidden state: bfloat16

    @property
    def active(self) -> int:
        return self.N * (self.T - max(1, round((1 - self.c) * self.T)))

    @property
    def half(self) -> bool:
        return self.element < FULL

    @property
    def hidden(self) -> int:
        return self.element * self.N * self.T * self.D

    @property
    def head(self) -> int:
        return self.element * self.V * self.D

    @property
    def logits(self) -> int:
        """Their number, of the positions that predict one."""
        return self.N * (self.T - 1) * self.V


class Device(NamedTuple):
    """What of a device decides."""

    kind: str
    scratch: int  # bytes of logits that linear_sequence_logps works on at a time
    chunk: int  # bytes that sequence_logps upcasts at a time; kernels upcast in registers
    gathers: bool  # whether TRL's head computes active positions only
    fold: int  # bytes per entry of a tile that TRL's head takes to fold it; kernels fold in place


CUDA = Device("cuda", SCRATCH["gpu"], chunk=0, gathers=True, fold=0)
CPU = Device("cpu", SCRATCH["cpu"], CHUNK_BYTES, gathers=False, fold=29)
TRL_ROWS, TRL_COLUMNS = 4096, 32768
"""A tile of TRL's head, allocated whole."""


def eager(step: Step, device: Device = CUDA) -> int:
    """In backward of the log-softmax: its output, what comes in and what goes out, all of them float32."""
    products = step.element * step.N * step.T * step.V + step.hidden + step.head
    return max(3 * FULL * step.logits, products)


def trl_fused_head(step: Step, device: Device = CUDA) -> int:
    """Gradients are added up in float32, then rounded beside that; one tile."""
    rows = step.active if device.gathers else step.N * (step.T - 1)
    tile_rows, columns = min(rows, TRL_ROWS), min(step.V, TRL_COLUMNS)
    held = (step.element + FULL) * rows * step.D + FULL * step.V * step.D + step.element * tile_rows * TRL_COLUMNS
    rounded = step.element * (rows * step.D + step.V * step.D) if step.half else 0
    return held + max(rounded, device.fold * tile_rows * columns)


def liger(step: Step, device: Device = CUDA) -> int:
    """A pair at a time, every position. torch.func differentiates so that the result could be differentiated again:
    float32 log-probs, what comes into their gradient and what leaves it stay."""
    chunk, pair = 2 * (step.T - 1) * step.V, step.element * 2 * (step.T - 1) * step.D
    earlier = step.element * (step.N - 2) * (step.T - 1) * step.D  # gradients of the pairs before
    softmax = (3 * FULL + (step.element if step.half else 0)) * chunk + step.head + pair
    product = (2 * FULL + step.element) * chunk + 2 * step.head + 2 * pair
    return earlier + max(softmax, product)


def liger_compiled(step: Step, device: Device = CUDA) -> int:
    """What torch's compiler makes of it on a CPU in half precision, read off, not derived: two float32 of each logit.
    The least would be logits and their gradient, half of that."""
    chunk, rows = 2 * (step.T - 1) * step.V, step.element * step.N * (step.T - 1) * step.D
    return 2 * FULL * chunk + step.head + rows


def from_logits(step: Step, device: Device = CUDA, *, inplace: bool = False) -> int:
    """Logits and their gradient, then this and those of the head; nothing else is of that size."""
    logits = step.element * step.N * step.T * step.V
    return max((1 if inplace else 2) * logits + device.chunk, logits + step.hidden + step.head)


def from_hidden(step: Step, device: Device = CUDA, *, budget: int | None = None) -> int:
    """Scratch for a chunk, the gradient of active hidden states in float32, and dlogits where the budget keeps them."""
    A, V = step.active, -(-step.V // 16) * 16
    budget = budget or device.scratch
    scratch = min(budget, device.scratch)
    per_logit = FULL + (step.element if step.half else 0)
    keeps = step.element * A * V + (scratch if step.half else 0) <= budget
    unit, gathered = FULL * A * step.D, step.element * A * step.D
    saved = unit + (step.element * A * V if keeps else 0)

    rows = balanced(A, max(1, scratch // (V * per_logit)), device.kind)[0].stop
    beside = (FULL if step.half else 0) if keeps else per_logit
    forward = saved + beside * rows * V + step.element * rows * step.D

    dhidden = saved + unit + (gathered if step.half else 0) + step.hidden
    columns = max(64, scratch // (A * per_logit))
    columns = min(V, columns // TILE * TILE or columns)
    product = gathered if keeps else per_logit * A * columns
    weighted = unit + gathered if keeps and step.half else 0  # before the factor of the product is rounded
    return max(forward, dhidden, saved + step.hidden + gathered + step.head + product, saved + step.hidden + weighted)


PATHS: dict[str, Callable[..., int]] = {
    "eager": eager,
    "Liger": liger,
    "Liger, compiled": liger_compiled,
    "TRL fused head": trl_fused_head,
    "napo_loss, from logits": from_logits,
    "napo_loss, from logits, in place": partial(from_logits, inplace=True),
    "napo_loss, from hidden states, dlogits kept": partial(from_hidden, budget=2**60),
    "napo_loss, from hidden states": from_hidden,
}
"""Ours with the smallest budget that costs no time but a product of four, and with one that keeps dlogits."""


def sequence_logps_of_logits(hidden: Tensor, weight: Tensor, labels: Tensor, *, inplace: bool = False):
    """A provider as those of :mod:`benchmarks.linear_providers`: a head that stores its logits, then ours."""
    return dpo(sequence_logps(F.linear(hidden, weight), labels, inplace_backward=inplace).sum)


def allocated(step: Callable[[], object]) -> int:
    """Most bytes of tensors that ``step()``, which has run before, holds at once beyond what was there: exact, where a
    process's pages are rounded and freed late. The profiler counts on a CPU, CUDA's allocator on a GPU."""
    if GPU:
        peak = Peak()
        step()
        return peak.bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        held = step()
    del held
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moved = sorted((x["ts"], x["args"]["Ev Idx"], x["args"]["Bytes"]) for x in events if x["name"] == "[memory]")
    now = most = 0
    for _, _, size in moved:
        now += size
        most = max(most, now)
    return most


def table(name: str) -> str:
    """GiB of one pair, by length and share of positions that count."""
    model = MODELS[name]
    columns = [f"{T // 1024}k, c = {c:g}" for c in SHARES for T in LENGTHS]
    lines = [f"| {name}, GiB | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for path, peak in PATHS.items():
        cells = [f"{peak(Step(2, T, model.D, model.V, c)) / 2**30:.3g}" for c in SHARES for T in LENGTHS]
        lines.append(f"| {path} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(NAMES), figsize=(13, 4.6), sharey=True, layout="constrained")
    colors = dict(zip(PATHS, plt.get_cmap("tab10").colors, strict=False))  # pyright: ignore
    for ax, name in zip(axes, NAMES, strict=True):
        model = MODELS[name]
        for label, peak in PATHS.items():
            for c, dashes in ((1.0, "-"), (0.3, "--")):
                y = [peak(Step(2, T, model.D, model.V, c)) / 2**30 for T in LENGTHS]
                width = 2.4 if label.startswith("napo_loss") else 1.4
                ax.plot(LENGTHS, y, dashes, color=colors[label], lw=width, label=label if c == 1 else None)
        for size in (24, 80):
            ax.axhline(size, color="#888888", lw=0.8, ls=":")
            ax.text(LENGTHS[0], size * 1.04, f"all of a {size} GiB card", fontsize=7, color="#555555")
        ax.set(xscale="log", yscale="log", xlabel="tokens of a sequence, two sequences")
        ax.set_title(f"{name}: V = {model.V}, D = {model.D}", fontsize=9)
        ax.set_xticks(LENGTHS, [f"{T // 1024}k" for T in LENGTHS])
        ax.set_xticks([], minor=True)
        ax.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        ax.set_yticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("GiB beyond hidden states and head")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "liger-kernel"))
    figure.suptitle(
        "Peak memory of head and loss, one preference pair in bfloat16, gradients included: derived for a GPU, by "
        f"formulas that tests hold\nagainst allocated bytes on a CPU ({versions}; 'compiled' is read off there). "
        "Solid: every position counts; dashed, where it differs: 30 %",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    from benchmarks.suite import paste

    folder = ROOT / "benchmarks/results"
    text = "\n\n".join(map(table, NAMES))
    (folder / "memory.md").write_text(text + "\n")
    paste(ROOT / "docs/memory.md", folder / "memory.md", text)
    draw(folder / "memory.png")
    print(text)


if __name__ == "__main__":
    main()
