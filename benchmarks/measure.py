"""How the suites measure: times of repeated steps, and the most memory that one step takes beyond what it leaves.

Device time on a GPU is ``triton.testing.do_bench``'s, which clears the L2 cache before every run. The host's clock has
no ready-made timer that takes turns: providers that run one after the other meet another machine each, wherever a
neighbour shares it, so here they alternate, and ratios are those of the same minute.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDS = 5  # turns of each provider
FEWEST = 3  # samples of a step that takes longer than its time
SHORTEST_MS = 1.0  # of a sample: shorter steps are repeated within one


def time_steps(
    steps: Mapping[str, Callable[[], object]], seconds: float, *, host_clock: bool = not GPU
) -> dict[str, list[float]]:
    """Milliseconds per call, sample by sample, of steps that have been called before. ``seconds``: for each step."""
    if host_clock:
        return _take_turns(steps, seconds)
    from triton.testing import do_bench

    rep = max(1, round(1e3 * seconds))
    return {name: do_bench(step, warmup=rep // 4, rep=rep, return_mode="all") for name, step in steps.items()}  # pyright: ignore


def _take_turns(steps: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    first = {name: _sample(step, 1) for name, step in steps.items()}
    calls = {name: max(1, math.ceil(SHORTEST_MS / ms)) for name, ms in first.items()}
    # A step shorter than a sample was timed with the clock's own cost in it.
    found = {name: [ms] if calls[name] == 1 else [] for name, ms in first.items()}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            samples, deadline = found[name], time.perf_counter() + seconds / ROUNDS
            if len(samples) >= FEWEST and sum(samples) * calls[name] > 1e3 * seconds:
                continue
            samples.append(_sample(step, calls[name]))
            while time.perf_counter() < deadline:
                samples.append(_sample(step, calls[name]))
    return found


def _sample(step: Callable[[], object], calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, between the smallest and the largest sample."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def extra_bytes(step: Callable[[], object], left: Callable[[], int]) -> int:
    """Peak memory of one step beyond what was there before and the bytes that it leaves (``left()``: gradients).

    The step must have run before, so that what is loaded and compiled at first use is not its own, and must have
    dropped what it left. On a CPU the peak is the process's (Linux): call this in one of its own,
    :func:`in_fresh_process`.
    """
    peak = Peak()
    step()
    return peak.bytes() - left()


class Peak:
    """The most memory since its making, beyond what was there then."""

    def __init__(self) -> None:
        gc.collect()
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self.before = _status("VmRSS")

    def bytes(self) -> int:
        if GPU:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return _status("VmHWM") - self.before


def _return_freed_memory() -> None:
    """What glibc keeps of freed memory would count as there before, and a step that uses it again as free of charge."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not say {name}")


def in_fresh_process(function: Callable[..., Any], *arguments) -> Any:
    """``function(*arguments)`` in a process that has run nothing else; on a GPU, whose allocator counts, here."""
    if GPU:
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=_server()) as pool:
        return pool.submit(function, *arguments).result()


@lru_cache
def _server() -> Any:
    """Forks processes from one that has imported the peers and run nothing: fresh without seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    return context
