"""Machine code of NVIDIA GPUs, read back: its instructions, and which of them are the loops where the time goes.

The disassembler is the one that Triton brings along, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BYTES = 16  # of an instruction, from Volta on


class Instruction(NamedTuple):
    predicate: str  # "", or the condition under which it runs: "@!P0"
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access(self) -> int:
        """Bytes that each lane reads from or writes to global memory."""
        if self.name not in ("LDG", "STG"):
            return 0
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)

    @property
    def target(self) -> int | None:
        """Index of the instruction that it branches to."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) // BYTES if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next one may follow."""
        conditional = self.predicate or "," in self.operands  # `BRA.U UP0, 0x340` names its condition as an operand
        return self.name not in ("BRA", "EXIT", "RET") or bool(conditional)


def run_tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    """All instructions of its kernel."""
    _, (kernel, *_helpers) = json.loads(run_tool("nvdisasm", "-json", "-c", cubin=cubin))
    found = kernel["sass-instructions"]
    return [Instruction(x.get("predicate", ""), x["opcode"], x.get("operands", "")) for x in found]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The body of each loop that holds no other, in the order of the code."""
    after = [_successors(code, i) for i in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    bodies: dict[int, set[int]] = {}
    for last, first in ((i, j) for i, following in enumerate(after) for j in following if j <= i):
        # A block moved out of the way jumps back as well; but that is no loop, since nothing leads there again.
        if last in _reached(first, after):
            bodies.setdefault(first, set()).update(_reached(last, before, stop=first))
    inner = [body for body in bodies.values() if not any(other < body for other in bodies.values())]
    return [[code[i] for i in sorted(body)] for body in sorted(inner, key=min)]


def _successors(code: list[Instruction], i: int) -> list[int]:
    x = code[i]
    found = [] if x.target is None else [x.target]
    return found + [i + 1] * (x.falls_through and i + 1 < len(code))


def _reached(start: int, edges: list[list[int]], stop: int | None = None) -> set[int]:
    """What can be reached along ``edges``, without going beyond ``stop``."""
    found, left = {start} if stop is None else {start, stop}, [start] if start != stop else []
    while left:
        for j in edges[left.pop()]:
            if j not in found:
                found.add(j)
                left.append(j)
    return found
