"""Runs cases: every provider becomes a row, whatever happens to it, and a run ends in the time that it was given.

The time is bounded by construction: a case begins only within its suite's share of :data:`LIMIT`, and its steps are
measured for a fixed time each. What no longer fits is a row that says so. On a GPU there are 54 cases of logits at 6
providers and 0.13 s, 17 of linear at 11, 6 of objective, and one of end_to_end: some two minutes of measuring; the rest
of the limit is for compilers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from benchmarks.measure import GPU, quantiles, time_steps
from benchmarks.record import Row

LIMIT = 440 if GPU else 660
"""Seconds after which no case begins: on a GPU a whole run, its last case included, has to end within 9 minutes."""

QUICK_LIMIT = 90
SHARES = {"logits": 4, "linear": 4, "objective": 1, "end_to_end": 1}
"""How the suites of a run share the limit; what one does not need goes to the next."""

Samples = list[float]
Timed = dict[str, Samples | Exception]


class Case(NamedTuple):
    row: Row  # the sizes, and the floor's bytes and FLOPs; each provider gets a copy
    providers: Sequence[str]
    time: Callable[[Sequence[str]], Timed]  # samples in the row's unit, or what went wrong
    memory: Callable[[str], int] | None = None
    errors: Callable[[str], dict[str, Any]] | None = None  # further columns


def run(cases: Iterable[Case], *, limit: float, rows: list[Row]) -> Iterator[Row]:
    """Appends to ``rows`` as it goes, so that an interrupt loses the case at hand only; yields the case to come."""
    start = time.perf_counter()
    cases = list(cases)
    shares = {suite: SHARES[suite] for suite in dict.fromkeys(case.row.suite for case in cases)}
    ends = dict(zip(shares, accumulate(shares.values()), strict=True))
    for case in cases:
        yield case.row
        if time.perf_counter() - start > limit * ends[case.row.suite] / sum(shares.values()):
            late = f"not run: the {limit:.0f} s of this run were over"
            rows += [replace(case.row, provider=name, note=late, **machine.describe()) for name in case.providers]
            continue
        rows += measure(case)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def measure(case: Case) -> list[Row]:
    """One row for each provider, with its times, memory and errors, or the reasons why they are missing."""
    timed = case.time(case.providers)
    rows = []
    for name in case.providers:
        row = replace(case.row, provider=name, **machine.describe())
        samples = timed[name]
        if isinstance(samples, Exception):
            rows.append(replace(row, note=reason(samples)))
            continue
        if samples:
            row.p20, row.p50, row.p80 = quantiles(samples)
            row.samples = len(samples)
        notes = []
        try:
            row.extra_bytes = case.memory(name) if case.memory else None
        except Exception as error:
            notes.append(reason(error))
        try:
            row = replace(row, **(case.errors(name) if case.errors else {}))
        except Exception as error:
            notes.append(reason(error))
        rows.append(replace(row, note="; ".join(notes)))
    if case.row.floor_bytes is not None or case.row.floor_flops is not None:
        rows = [_with_floor(row) for row in rows]
    return rows


def _with_floor(row: Row) -> Row:
    bandwidth, rate = machine.copy_bandwidth(), machine.gemm_rate(row.dtype)
    floor = 1e3 * max((row.floor_bytes or 0) / bandwidth, (row.floor_flops or 0) / rate)
    share = floor / row.p50 if row.p50 else None
    return replace(
        row, floor=floor, share_of_floor=share, copy_gb_s=bandwidth / 1e9, gemm_tflop_s=rate / 1e12
    )  # fmt: skip


def side_by_side(
    start: Callable[[str], Callable[[], object]],
    providers: Sequence[str],
    seconds: float,
    *,
    host_clock: bool = not GPU,
) -> Timed:
    """Times the steps that ``start(provider)`` gives, each called once before; a failure is the provider's own."""
    if GPU:  # one at a time: what a step holds on to is memory that the next needs
        return {name: _alone(start, name, seconds, host_clock) for name in providers}
    steps: dict[str, Callable[[], object]] = {}
    failed: Timed = {}
    for name in providers:
        try:
            step = start(name)
            step()
            steps[name] = step
        except Exception as error:  # a peer may fail in any way; its row says how
            failed[name] = error.with_traceback(None)  # which holds tensors
    return failed | time_steps(steps, seconds, host_clock=host_clock)


def _alone(start: Callable, name: str, seconds: float, host_clock: bool) -> Samples | Exception:
    try:
        step = start(name)
        step()
        return time_steps({name: step}, seconds, host_clock=host_clock)[name]
    except Exception as error:
        return error.with_traceback(None)


def reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120] if text else 'no message'}"


def scaled(timed: Mapping[str, Samples | Exception], factor: float) -> Timed:
    return {name: x if isinstance(x, Exception) else [factor * ms for ms in x] for name, x in timed.items()}
