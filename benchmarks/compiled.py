"""Compiles each kernel for each target, without a GPU, and reads what the machine code says of itself.

Registers, spills, shared memory and access widths on every target; on NVIDIA's also instructions, special functions and
barriers, and what share of a copy's bandwidth they leave room for.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from benchmarks.launches import DTYPES, Launch, cases, record
from benchmarks.pipes import GPUS, Element, count
from benchmarks.sass import run_tool

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
}


class Code(NamedTuple):
    """What is read off the machine code. None: not for this target, or no row long enough for a loop."""

    registers: int
    spills: int  # bytes of local memory (NVIDIA) or spilled registers (AMD)
    shared: int  # bytes
    load_bytes: int  # the widest load from global memory, per lane
    store_bytes: int
    instructions_per_element: float | None = None  # of the loop that takes most
    mufu_per_element: float | None = None
    barriers_per_iteration: int | None = None
    share_a100: float | None = None  # of a copy's bandwidth, at most; above 1: with room to spare
    share_h100: float | None = None
    share_h200: float | None = None
    share_b200: float | None = None


class Report(NamedTuple):
    kernel: str
    case: str
    target: str
    code: Code

    @classmethod
    def columns(cls) -> list[str]:
        return [*cls._fields[:3], *Code._fields]

    def row(self) -> list[str]:
        return [*self[:3], *("" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x) for x in self.code)]

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Report:
        code: dict[str, Any] = dict.fromkeys(Code._fields)
        for name in code:
            if text := row[name]:
                code[name] = float(text) if "." in text else int(text)
        return cls(row["kernel"], row["case"], row["target"], Code(**code))


class Source(NamedTuple):
    """A launch as Triton would compile it: constants, integers equal to 1, multiples of 16, where it asks for them."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, Any]

    @classmethod
    def of(cls, launch: Launch) -> Source:
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(launch.kernel.arg_names):
            value, param = launch.arguments[name], launch.kernel.params[i]
            special = not param.do_not_specialize
            if param.is_constexpr or (special and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + {torch.int64: "i64", **{v: k for k, v in DTYPES.items()}}[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            else:
                signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
            if aligned and special and not param.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return cls(launch.kernel, signature, constants, attributes, launch.options)

    def compile(self, target: GPUTarget):
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=self.options)

    def key(self, *more: object) -> str:
        """Of all that decides what is read off the code: the kernel, how it is compiled, and the files that read."""
        with_readers = (self.kernel.cache_key, *self[1:], triton.__version__, _readers(), *more)
        return hashlib.sha256(repr(with_readers).encode()).hexdigest()


@lru_cache
def _readers() -> str:
    return "".join((Path(__file__).parent / f"{name}.py").read_text() for name in ("compiled", "pipes", "sass"))


def inspect(compiled, target: GPUTarget, element: Element | None, num_warps: int) -> Code:
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
        return Code(registers, spills, shared, _amd_width(text, "load"), _amd_width(text, "store"))
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)))
    registers, spills = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
    code = Code(registers, spills, shared, _ptx_width(ptx, "ld"), _ptx_width(ptx, "st"))
    if element is None:
        return code
    found = count(cubin, element)
    gpus = {name: gpu for name, gpu in GPUS.items() if gpu.target == f"sm_{target.arch}"}
    shares = {f"share_{name}": found.share(gpu, gpu.resident_warps(registers, num_warps)) for name, gpu in gpus.items()}
    return code._replace(
        instructions_per_element=found.instructions,
        mufu_per_element=found.mufu,
        barriers_per_iteration=found.barriers,
        **shares,
    )


def _ptx_width(ptx: str, kind: str) -> int:
    found = re.findall(rf"\b{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _amd_width(text: str, kind: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1}
    found = re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text)
    return max((size for name in found for key, size in sizes.items() if name.startswith(key)), default=0)


@lru_cache
def _launches() -> list[tuple[str, Launch]]:
    return [(case, launch) for case, call in cases() for launch in record(call)]


def _read(i: int, target: str) -> Code:
    """Of launch ``i``; kept in Triton's cache beside the machine code, since reading takes longer than compiling."""
    _, launch = _launches()[i]
    source = Source.of(launch)
    cache = get_cache_manager(source.key(target, launch.element()))
    if path := cache.get_file("code.json"):
        return Code(*json.loads(Path(path).read_text()))
    compiled = source.compile(TARGETS[target])
    code = inspect(compiled, TARGETS[target], launch.element(), launch.options["num_warps"])
    cache.put(json.dumps(code), "code.json", binary=False)
    return code


def compile_all(targets: Sequence[str] = tuple(TARGETS), without: str | None = None) -> list[Report]:
    """Every case (but those whose name holds the word ``without``) on every target, a process per core; what is the
    same in two cases is compiled once."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated; interpreted kernels do not compile
    chosen = {i: x for i, x in enumerate(_launches()) if without is None or without not in x[0]}
    keys = {i: Source.of(launch).key(launch.element()) for i, (_, launch) in chosen.items()}
    first = {key: i for i, key in reversed(keys.items())}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all of them
    work = [(i, target) for i in first.values() for target in targets]
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        found = pool.map(_read, *zip(*work, strict=True), chunksize=4)
        codes = dict(zip(work, tqdm(found, total=len(work), unit="kernel", disable=None), strict=True))
    return [
        Report(launch.kernel.__name__, case, target, codes[first[keys[i]], target])
        for i, (case, launch) in chosen.items()
        for target in targets
    ]
