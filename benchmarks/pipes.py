"""How fast machine code can run at best: its inner loop against what a multiprocessor can do while a copy would run.

Counted from the code: instructions, special functions and barriers of the loop, the pipe that each instruction needs,
bytes, and loads in flight. From data sheets, the CUDA programming guide and published microbenchmarks: clocks,
bandwidths, rates of the pipes, the latency of a load. A share is an upper bound in units of the bandwidth that a copy
reaches: 2 says that a memory twice as fast would still be kept busy, 0.5 that half the copy's bandwidth is the most to
be had. Not modelled: who waits for whom. A barrier makes all warps of a program wait for the last of them, so barriers
are counted by themselves. Never calibrated on a GPU: trust the order, not the digits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.sass import Instruction, disassemble, innermost_loops

WARP = 32


class Gpu(NamedTuple):
    target: str
    multiprocessors: int
    clock: float  # GHz, under load
    copy: float  # TB/s that a copy reaches, about nine tenths of the data sheet
    fma_lanes: int  # float32 results a clock and multiprocessor
    latency: int  # clocks of a load from memory, under load
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    @property
    def bytes_a_clock(self) -> float:
        """A multiprocessor's share of the memory."""
        return 1e3 * self.copy / (self.multiprocessors * self.clock)

    def resident_warps(self, registers: int, num_warps: int) -> int:
        """Of programs that run on one multiprocessor at a time."""
        per_warp = -(-registers // 8) * 8 * WARP
        return num_warps * min(self.registers // (per_warp * num_warps), self.warps // num_warps, self.programs)


GPUS = {
    "a100": Gpu("sm_80", 108, 1.41, 1.8, fma_lanes=64, latency=700),
    "h100": Gpu("sm_90", 132, 1.755, 3.0, fma_lanes=128, latency=750),
    "h200": Gpu("sm_90", 132, 1.755, 4.3, fma_lanes=128, latency=750),
    "b200": Gpu("sm_100", 148, 1.9, 7.2, fma_lanes=128, latency=900),
}

PIPES = {
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 FADD2 FMUL2 FFMA2 IMAD",
    "xu": "MUFU F2F F2I I2F I2I FRND POPC FLO BREV",
    "lsu": "LDG STG LDS STS LDL STL LDGSTS SHFL ATOM ATOMG ATOMS RED",
    "none": "BRA EXIT RET BSSY BSYNC BAR NOP WARPSYNC LDC S2R S2UR CS2R R2UR DEPBAR LDGDEPBAR",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
TWICE = ("FADD2", "FMUL2", "FFMA2", "IMAD")  # two results a lane, or half the rate
LANES = {"alu": 64, "xu": 16, "lsu": 32, "issue": 128}  # results a clock; issue: four schedulers, one instruction each
L1_BYTES = 128  # a clock, between a multiprocessor and its first cache


class Element(NamedTuple):
    """What a kernel does per element, as its launcher knows it."""

    read: int  # bytes
    written: int
    lane: float  # elements of a lane, in a program without a loop


class Count(NamedTuple):
    """Of one loop, or of a program without one."""

    elements: float  # of a lane and iteration
    instructions: float  # per element
    mufu: float  # special functions (exp2, reciprocal) per element
    barriers: int  # per iteration
    read: float  # bytes per element
    written: float
    lanes: Mapping[str, float]  # of each pipe, per element

    def share(self, gpu: Gpu, resident_warps: int) -> float:
        """Of a copy's bandwidth, at most; above 1: with room to spare."""
        rates = {**LANES, "fma": gpu.fma_lanes, "l1": L1_BYTES}
        clocks = max(lanes / rates[pipe] for pipe, lanes in self.lanes.items())
        if self.read:  # a warp that waits for its loads has no more than those of one iteration in flight
            clocks = max(clocks, gpu.latency / (resident_warps * WARP * self.elements))
        return (self.read + self.written) / gpu.bytes_a_clock / clocks


def count(cubin: bytes, element: Element) -> Count:
    """Of the loop that takes most instructions per element; of the whole program if none reads or writes memory."""
    code = disassemble(cubin)
    loops = [body for body in innermost_loops(code) if any(x.access for x in body)]
    found = [count_code(body, element) for body in loops] or [count_code(code, element, element.lane)]
    return max(found, key=lambda x: x.instructions)


def count_code(code: Sequence[Instruction], element: Element, elements: float = 0) -> Count:
    read, written = _moved(code, "LDG"), _moved(code, "STG")
    if elements:  # a program counts its masked and its plain accesses, of which it makes one
        read, written = element.read * elements, element.written * elements
    else:
        elements = read / element.read if read else written / element.written
    code = [x for x in code if x.name != "NOP"]
    lanes = {"issue": len(code), "l1": read + written}
    for x in code:
        pipe = PIPE_OF.get(x.name, "none" if x.name.startswith("U") else "alu")  # U: once for the whole warp
        if pipe != "none":
            lanes[pipe] = lanes.get(pipe, 0) + (2 if x.name in TWICE else 1)
    return Count(
        elements=elements,
        instructions=len(code) / elements,
        mufu=sum(x.name == "MUFU" for x in code) / elements,
        barriers=sum(x.name == "BAR" for x in code),
        read=read / elements,
        written=written / elements,
        lanes={pipe: n / elements for pipe, n in lanes.items()},
    )


def _moved(code: Sequence[Instruction], name: str) -> int:
    """Bytes of a lane. Of accesses under conditions, which are other ways of doing the same, one condition's."""
    found: Counter = Counter()
    for x in code:
        if x.name == name:
            found[x.predicate] += x.access
    always = found.pop("", 0)
    return always + max(found.values(), default=0)
