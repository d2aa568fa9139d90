"""Time, memory and accuracy from hidden states to gradients, against what users would pick instead.

    python -m benchmarks linear [--quick]

Providers run side by side in one process on the same tensors; memory on a CPU is measured in a process of its own.
Writes ``results/linear-<device>.csv`` and ``.png`` and ``linear.md`` (``--quick``: only prints).
"""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.linear_providers import PROVIDERS, dpo, inputs, memory, stepper
from benchmarks.measure import DEVICE, GPU, RESULTS, device_name, file_name, in_subprocess, times
from napo_loss import reference

ACTIVE = (0.1, 0.3, 1.0) if GPU else (0.05, 0.1, 0.3, 0.4, 1.0)
SHAPES = {  # name: N, T, D, V
    **({"Llama-3-8B": (8, 1024, 4096, 128256), "Llama-3-8B, long": (8, 4096, 4096, 128256)} if GPU else {}),
    **({} if GPU else {"1 B model": (8, 256, 1024, 32000)}),
}
FROZEN = 0.3 if GPU else 0.4  # the active share at which a frozen head is measured
DTYPE = torch.bfloat16 if GPU else torch.float32
ACCURACY = (4, 401, 1024, 32000)  # 400 tokens a sequence
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
COLUMNS = (
    "device", "shape", "N", "T", "D", "V", "dtype", "c", "head", "provider", "p20_ms", "p50_ms", "p80_ms",
    "extra_bytes", "gemm_share", "logps_rms_nat", "hidden_grad_error", "weight_grad_error", "bit_identical", "note",
)  # fmt: skip


def run_linear(*, quick: bool) -> None:
    """Every row, a provider that cannot run included with its reason."""
    shapes = {"tiny": (4, 32, 64, 1000)} if quick else SHAPES
    trained = [(shape, c, "trained", p) for shape in shapes for c in ((0.3,) if quick else ACTIVE) for p in PROVIDERS]
    frozen = [(shape, FROZEN, "frozen", p) for shape in shapes for p in ("napo_loss", "eager")]
    jobs = trained + frozen
    rows = []
    progress = tqdm(total=len(jobs) + len(PROVIDERS), unit="case", disable=None)
    try:
        for provider in PROVIDERS:
            shape = (4, 33, 64, 1000) if quick else ACCURACY
            rows.append(_row("accuracy", shape, torch.bfloat16, 1.0, "trained", provider) | accuracy(provider, shape))
            progress.update()
        for shape, c, head, provider in jobs:
            row = _row(shape, shapes[shape], DTYPE, c, head, provider)
            rows.append(row | speed(provider, shapes[shape], c, head == "trained"))
            rows[-1] |= {} if quick else space(provider, shapes[shape], c, head == "trained")
            progress.update()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept")
    progress.close()
    for row in rows:
        print("; ".join(f"{name} {row[name]}" for name in COLUMNS[1:] if row[name] != ""))
    if not quick:
        write(rows)


def _row(shape: str, sizes, dtype: torch.dtype, c: float, head: str, provider: str) -> dict[str, Any]:
    names = dict(zip("NTDV", sizes, strict=True))
    given = {"device": device_name(), "shape": shape, **names, "dtype": str(dtype).removeprefix("torch."), "c": c}
    return {**dict.fromkeys(COLUMNS, ""), **given, "head": head, "provider": provider}


def speed(provider: str, shape, c: float, trained: bool) -> dict[str, Any]:
    try:
        step, _ = stepper(provider, shape, c, DTYPE, trained)
        p20, p50, p80 = times(step)
    except Exception as error:  # a peer may fail in any way; the table says how
        return {"note": _reason(error)}
    N, T, D, V = shape
    flops = (3 if trained else 2) * c * 2 * N * T * D * V  # what this library needs with D kept
    share = f"{flops / (p50 / 1e3) / gemm_rate():.2f}"
    return {"p20_ms": f"{p20:.1f}", "p50_ms": f"{p50:.1f}", "p80_ms": f"{p80:.1f}", "gemm_share": share}


def space(provider: str, shape, c: float, trained: bool) -> dict[str, Any]:
    job = {"provider": provider, "shape": list(shape), "c": c, "trained": trained}
    if not GPU:
        done = in_subprocess("benchmarks.linear_providers", job | {"dtype": str(DTYPE).removeprefix("torch.")})
        return {"extra_bytes": done["extra_bytes"]} if "extra_bytes" in done else {"note": done["error"]}
    try:
        return {"extra_bytes": memory(**job, dtype=DTYPE)}
    except Exception as error:
        return {"note": _reason(error)}


_rate: list[float] = []


def gemm_rate() -> float:
    """FLOP/s of a large product of this dtype on random data, measured once in the same run."""
    if not _rate:
        n = 8192 if GPU else 2048
        a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
        _rate.append(2 * n**3 / (times(lambda: a @ a)[0] / 1e3))
    return _rate[0]


def accuracy(provider: str, shape) -> dict[str, Any]:
    """Errors in bfloat16 against float64 of the same inputs; and whether a second run gives the same bits."""
    try:
        step, _ = stepper(provider, shape, 1.0, torch.bfloat16, True)
        (sums, grads), (again, grads_again) = step(), step()
    except Exception as error:
        return {"note": _reason(error)}
    total, exact = exact_step(shape)
    errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, exact, strict=True)]
    same = torch.equal(sums, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    return {
        "logps_rms_nat": f"{(sums.double() - total).square().mean().sqrt().item():.4f}",
        "hidden_grad_error": f"{errors[0]:.5f}",
        "weight_grad_error": f"{errors[1]:.5f}",
        "bit_identical": same,
    }


@lru_cache
def exact_step(shape) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Log-probs and gradients in float64 of the bfloat16 inputs; the same for every provider."""
    hidden, weight, labels = inputs(shape, 1.0, torch.bfloat16)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, sums = dpo(reference.linear_sequence_logps(x, w, labels).sum)
    return sums.detach(), torch.autograd.grad(loss, [x, w])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}"


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    return ", ".join(found)


def write(rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file_name('linear')}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "versions"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"versions": versions()} for row in rows)
    (RESULTS / "linear.md").write_text(table(rows))
    plot(rows)


def table(rows: list[dict]) -> str:
    """Medians and extra memory with a trained head, and the accuracy, as README shows them."""
    timed = [r for r in rows if r["shape"] == next(iter(SHAPES)) and r["head"] == "trained"]
    exact = {r["provider"]: r for r in rows if r["shape"] == "accuracy"}
    active = sorted({r["c"] for r in timed})
    first = timed[0]
    sizes = f"N={first['N']}, T={first['T']}, D={first['D']}, V={first['V']}"
    head = ["rms error, nat", *(f"c = {c}" for c in active)]
    lines = [f"| {device_name()}; {sizes}; {first['dtype']} | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|"]
    notes = []
    for provider in PROVIDERS:
        cells = sorted((r for r in timed if r["provider"] == provider), key=lambda r: r["c"])
        if not any(r["p50_ms"] for r in cells):
            notes.append(f"{provider}: {cells[0]['note']}." if cells else f"{provider}: not measured.")
            continue
        shown = [f"{r['p50_ms']} ms, {_mib(r['extra_bytes'])}" if r["p50_ms"] else "–" for r in cells]
        lines.append(f"| {provider} | {exact[provider]['logps_rms_nat']} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"{versions()}; median of forward + backward, extra memory. " + " ".join(notes), ""])


def _mib(size) -> str:
    return "–" if size == "" else f"{max(0, int(size)) / 2**20:.0f} MiB"


def plot(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["shape"] == next(iter(SHAPES)) and r["head"] == "trained" and r["p50_ms"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for provider in PROVIDERS:
        mine = sorted((r for r in timed if r["provider"] == provider), key=lambda r: r["c"])
        if not mine:
            continue
        c = [r["c"] for r in mine]
        axes[0].plot(c, [float(r["p50_ms"]) for r in mine], "o-", label=provider)
        held = [(r["c"], int(r["extra_bytes"]) / 2**20) for r in mine if r["extra_bytes"] != ""]
        axes[1].plot([x for x, _ in held], [y for _, y in held], "o-", label=provider)
    for axis, unit in zip(axes, ("ms, forward + backward", "MiB beyond inputs and gradients"), strict=True):
        axis.set(xlabel="active share c of the positions", ylabel=unit, ylim=(0, None))
    axes[1].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.6))
    figure.suptitle(f"{device_name()}, {versions()}", fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{file_name('linear')}.png", dpi=120)
