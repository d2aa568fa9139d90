"""The row that all suites write, its CSV, and the comparison of two runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

SUITES = ("logits", "linear", "objective", "end_to_end")


@dataclass
class Row:
    """One provider in one case. Times in ``unit``, sizes in bytes; None where it does not apply or was not measured."""

    suite: str
    shape: str
    provider: str
    what: str  # the part that is timed
    unit: str = "ms"
    N: int | None = None
    T: int | None = None
    D: int | None = None
    V: int | None = None
    dtype: str = ""
    c: float | None = None
    active: int | None = None  # positions that count, A
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples: int | None = None
    extra_bytes: int | None = None  # peak memory of a step beyond inputs and what it leaves
    floor_bytes: int | None = None  # what has to be moved
    floor_flops: int | None = None  # what has to be multiplied
    floor: float | None = None  # the time of these at the copy bandwidth and GEMM rate below
    share_of_floor: float | None = None  # floor / p50: 1 cannot be beaten
    logps_error: float | None = None  # rms of the sequence log-probs against float64, nat; of the losses for objective
    grad_error: float | None = None  # ‖g − exact‖ / ‖exact‖, of the first input
    weight_grad_error: float | None = None
    same_bits: bool | None = None  # whether a second run gives the same
    note: str = ""  # why something is missing
    device: str = ""
    driver: str = ""  # of a GPU; the instruction set on a CPU
    torch: str = ""
    triton: str = ""
    peers: str = ""
    commit: str = ""
    copy_gb_s: float | None = None
    gemm_tflop_s: float | None = None

    @property
    def key(self) -> tuple:
        return (self.suite, self.shape, self.N, self.T, self.dtype, self.c, self.what, self.provider)

    @property
    def name(self) -> str:
        """The key to read."""
        sizes = [f"{x}={value}" for x in ("N", "T", "c") if (value := getattr(self, x)) is not None]
        return " ".join([self.suite, self.shape, *sizes, self.what, "|", self.provider])


TYPES = {name: str(kind) for name, kind in get_type_hints(Row).items()}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _rounded(value) for name, value in asdict(row).items()})


def _rounded(value):
    return f"{value:.5g}" if isinstance(value, float) else value


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = [
            {k: _parsed(k, text) for k, text in line.items()} for line in csv.DictReader(file)
        ]
    return [Row(**line) for line in lines]


def _parsed(name: str, text: str):
    kind = TYPES[name]
    if "str" in kind:
        return text
    if text == "":
        return None
    if "bool" in kind:
        return text == "True"
    return float(text) if "float" in kind else int(text)


def merge(old: Sequence[Row], new: Sequence[Row], finished: Iterable[str]) -> list[Row]:
    """``new`` in place of what it measures again; a finished suite leaves none of its old rows."""
    finished, keys = set(finished), {row.key for row in new}
    kept = [row for row in old if row.suite not in finished and row.key not in keys]
    return sorted([*new, *kept], key=lambda row: SUITES.index(row.suite))


TOLERANCE = 1.05
"""Medians closer than this are equal, however narrow the spread of one run: the next run's differs as much."""


def compare(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines for every case in both, and those where one of our own providers lost ground.

    Slower means slower beyond the spread: p20 now is above p80 then. A provider that ran then and fails now lost too.
    """
    before = {row.key: row for row in old if row.p50 is not None}
    lines, regressions = [], []
    for row in new:
        then = before.get(row.key)
        if then is None or then.p50 is None or then.p20 is None or then.p80 is None:
            continue
        verdict = ""
        if row.p50 is None or row.p20 is None or row.p80 is None:
            ratio, verdict = "   –", f"FAILS NOW: {row.note}"
        else:
            ratio = f"{row.p50 / then.p50:.2f}"
            if row.p20 > then.p80 and row.p50 > TOLERANCE * then.p50:
                verdict = "SLOWER"
            elif row.p80 < then.p20 and then.p50 > TOLERANCE * row.p50:
                verdict = "faster"
        line = f"{ratio:>6}  {row.name}  {verdict}".rstrip()
        lines.append(line)
        if verdict.isupper() or verdict.startswith("FAILS"):
            regressions += [line] if row.provider.startswith("napo_loss") else []
    devices = {row.device for row in old} ^ {row.device for row in new}
    if lines and devices:
        lines.append(f"not the same device: {'; '.join(sorted(devices))}")
    return lines, regressions
