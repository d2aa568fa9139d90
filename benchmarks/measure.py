"""How the suites measure: times of repeated steps, and the most memory that one step takes beyond what it leaves."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SECONDS = 2.0  # of measuring per provider and shape
RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def file_name(suite: str) -> str:
    return f"{suite}-{device_name().split(',')[0].replace(' ', '-')}"


def times(step: Callable[[], object]) -> list[float]:
    """p20, p50 and p80 in milliseconds, after one step to warm up."""
    step()
    if GPU:
        import triton.testing

        return list(triton.testing.do_bench(step, rep=500, quantiles=[0.2, 0.5, 0.8]))  # pyright: ignore
    found, deadline = [], time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - start))
    p20, _, _, p80 = statistics.quantiles(found, n=5)
    return [p20, statistics.median(found), p80]


def extra_bytes(step: Callable[[], object], left: Callable[[], int]) -> int:
    """Peak memory of one step beyond what was there before and the bytes that it leaves (``left()``: gradients).

    On a CPU the peak is the process's (Linux): call this in a process of its own, :func:`in_subprocess`.
    """
    if GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - left()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before - left()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not say {name}")


def in_subprocess(module: str, arguments: dict) -> dict:
    """What ``python -m module '<arguments as JSON>'`` prints last, as JSON; its error where it fails."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])
