"""What ran, what it ran on, and what was wrong: a page of the documentation."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .cases import Case
from .running import Failure
from .spaces import SPACES

ROOT = Path(__file__).parent.parent.parent
SHOWN = (
    "backend", "dtype", "call", "packed", "values", "layout", "weights", "lora", "softcap", "budget", "max_active",
    "statistics", "inplace", "shard", "trained", "recipe", "q_from", "fused", "lengths", "pair_mask", "K", "beta_is",
    "W",
)  # fmt: skip
"""Options that are counted; ``layout`` of any argument."""

TITLE = """# The fuzzer

`make fuzz` draws cases of the public functions, each from a seed, and compares every number with plain float64
formulas that import nothing of the package: values, gradients, q, weights, moments, token statistics. An entry may be
off by twice the error that the same formula has in the working dtype, and by {few} roundings (in float64, where the
formula itself is rounded as often, by four times as many; an exponential of a kernel by those of the 41 nats that its
base may lie below a row's largest logit). No tolerance is chosen by hand. Arguments are compared with what they were,
byte by byte, those between their elements too, and no result may share memory with one.

`python -m tests.fuzz --replay 123456` runs one case again, with `--function` where the run had it; what fails is first
made as simple as it can be while it fails. Not drawn: `fused_head`, which [a test of many models](models.md) covers, a
GPU, and bad arguments but for labels outside the vocabulary.
"""


@dataclass
class Tally:
    """Counts of what ran."""

    functions: Counter[str] = field(default_factory=Counter)
    options: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, case: Case, failure: Failure | None) -> None:
        self.functions[case.function] += 1
        for name in case.relevant():
            short = name.rpartition(".")[2]
            short = "layout" if short.endswith("layout") else short
            if short in SHOWN:
                self.options.setdefault(short, Counter())[str(case.options[name])] += 1
        if failure is not None:
            self.failures.append(failure)

    @property
    def cases(self) -> int:
        return sum(self.functions.values())


def commit() -> str:
    given = {"capture_output": True, "text": True, "cwd": ROOT}
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **given)
    changed = subprocess.run(["git", "status", "--porcelain", "--", "napo_loss", "kernels", "tests/fuzz"], **given)
    return (found.stdout.strip() or "unknown") + (", with changes" if changed.stdout.strip() else "")


def written(tally: Tally, command: str, few: int) -> str:
    """The page."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {_triton()}, {platform.machine()}"
    lines = [TITLE.format(few=few), "## The last run", ""]
    lines += [f"`{command}` at {commit()}; {versions}, no GPU: kernels in Triton's interpreter.", ""]
    lines += [f"**{tally.cases} cases, {len(tally.failures)} wrong.**", "", "| function | cases |", "|---|---:|"]
    lines += [f"| `{name}` | {tally.functions[name]} |" for name in SPACES if tally.functions[name]]
    lines += ["", "How often each value of an option was drawn; of a layout, over all arguments:", ""]
    lines += ["| option | values |", "|---|---|"]
    for name in SHOWN:
        if name in tally.options:
            counts = ", ".join(f"{value} {count}" for value, count in tally.options[name].most_common())
            lines.append(f"| {name} | {counts} |")
    for failure in tally.failures:
        lines += ["", f"- {failure.case}", f"  simplest: {failure.simplest}", f"  {failure.message}"]
    return "\n".join(lines) + "\n"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "no Triton"
    return f"Triton {triton.__version__}"
