"""What can be known of the kernels without a GPU: what their machine code says on every target, and bytes moved.

    python -m benchmarks static [--check [--targets sm_90 …] [--without fp16]]

writes ``results/static.csv`` and ``results/traffic.csv``. With ``--check`` nothing is written; what was committed is
the bound: a kernel that spills, loads or stores in narrower pieces, takes more instructions or barriers, or moves more
bytes, fails. ``--targets`` compiles for some of them only, ``--without`` leaves out cases; then no bytes are counted.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

from benchmarks.compiled import TARGETS, Code, Report, compile_all
from benchmarks.traffic import Traffic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MOST = 1.1
"""Bytes moved from logits to gradient, at most, over those that have to be: (2c + 1)·L."""
DRIFT = 1.03
"""Instructions per element, at most, over those committed: another version of the compiler may take a few others."""


def run_static(*, check: bool, targets: Sequence[str] | None = None, without: str | None = None) -> int:
    """Prints the tables and writes them, or compares them with those committed; returns the exit status."""
    with ThreadPoolExecutor() as beside:
        counted = beside.submit(count_traffic) if targets is None and without is None else None
        found, moved = compile_all(targets or tuple(TARGETS), without), counted.result() if counted else []
    print("registers spills shared load store | instructions, MUFU per element, barriers | share of a copy, at most")
    for r in found:
        print("{:22} {:34} {:8}".format(*r[:3]) + (" {:>6}" * len(Code._fields)).format(*r.row()[3:]))
    for row in moved:
        print(f"{row.case:44} read {row.read:>10}  written {row.written:>10}  floor {row.floor:>10}  {row.ratio:.4f}")
    bad = [f"{r.kernel} ({r.case}) on {r.target}: {fault}" for r in found if (fault := faults(r))]
    bad += [f"{r.case}: moves {r.ratio:.3f} times its floor" for r in moved if too_much(r)]
    if check:
        committed = {r[:3]: r.code for r in map(Report.from_row, _read("static.csv"))}
        worse, notes = compare_compiled(found, committed)
        more, further = compare_traffic(moved, committed_traffic())
        bad += worse + more
        print(*notes, *further, sep="\n")
    print(f"{len(found)} kernels compiled by triton {triton.__version__}", *bad, sep="\n")
    if not check:
        _write("static.csv", [*Report.columns(), "triton"], [[*r.row(), triton.__version__] for r in found])
        _write("traffic.csv", [*Traffic._fields, "ratio"], [[*r, f"{r.ratio:.4f}"] for r in moved])
    return 1 if bad else 0


def count_traffic() -> list[Traffic]:
    """In a process of its own, where kernels are interpreted instead of compiled."""
    command = [sys.executable, "-m", "benchmarks.traffic"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting failed: {done.stderr[-2000:]}")
    return [Traffic(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def faults(report: Report) -> str | None:
    """What must never happen: a spill, or aligned logits read or written in less than 16 bytes a lane."""
    code, case = report.code, report.case
    if code.spills:
        return f"{code.spills} spilled"
    wide = report.kernel.startswith(("logps_forward", "logps_backward")) and case.endswith(("50257", "128256"))
    # The linear path reads what torch.mm wrote, whose rows are aligned where V is a multiple of 16.
    wide |= report.kernel.startswith(("linear_rows", "linear_block")) and case.endswith("128256")
    if wide and code.load_bytes < 16:
        return f"loads {code.load_bytes} bytes at a time"
    if wide and not report.kernel.startswith("logps_forward") and code.store_bytes < 16:
        return f"stores {code.store_bytes} bytes at a time"
    return None


def too_much(traffic: Traffic) -> bool:
    return traffic.case.startswith("from logits") and traffic.ratio > MOST


def compare_compiled(found: Sequence[Report], committed: Mapping[tuple, Code]) -> tuple[list[str], list[str]]:
    """What got worse, which fails, and what merely moved: registers drift with every version of the compiler."""
    worse, notes, drifted = [], [], 0
    for r in found:
        then, now = committed.get(r[:3]), r.code
        where = f"{r.kernel} ({r.case}) on {r.target}"
        if then is None:
            notes.append(f"{where}: new; run `python -m benchmarks static`")
            continue
        got_worse = {
            "load_bytes": now.load_bytes < then.load_bytes,
            "store_bytes": now.store_bytes < then.store_bytes,
            "spills": now.spills > then.spills,
            "barriers_per_iteration": (now.barriers_per_iteration or 0) > (then.barriers_per_iteration or 0),
            "instructions_per_element": (now.instructions_per_element or 0)
            > DRIFT * (then.instructions_per_element or 0) + 0.01,
        }
        worse += [f"{where}: {x} {getattr(then, x)} -> {getattr(now, x)}" for x, bad in got_worse.items() if bad]
        drifted += (now.registers, now.shared) != (then.registers, then.shared)
    if drifted:
        notes.append(f"{drifted} of {len(found)}: other registers or shared memory than committed, which is no fault")
    return worse, notes


def committed_traffic() -> dict[str, int]:
    """Bytes of each case."""
    return {line["case"]: int(line["read"]) + int(line["written"]) for line in _read("traffic.csv")}


def compare_traffic(found: Sequence[Traffic], committed: dict[str, int]) -> tuple[list[str], list[str]]:
    worse, notes = [], []
    for r in found:
        before = committed.get(r.case)
        if before is None:
            notes.append(f"{r.case}: new; run `python -m benchmarks static`")
        elif r.read + r.written > before:
            worse.append(f"{r.case}: moves {before} -> {r.read + r.written} bytes")
    return worse, notes


def _read(name: str) -> list[dict[str, str]]:
    """The lines of a committed table."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(name: str, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
