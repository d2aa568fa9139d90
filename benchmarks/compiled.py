"""Compiles each kernel for each target, without a GPU, and reads registers, spills, shared memory and access widths.

Every launcher is called once with tensors whose launch is recorded instead of run; what it would have launched is
then compiled ahead of time, so the table shows the very specialisations that a GPU would get.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from napo_loss.objective import eager
from napo_loss.objective.negatives import BatchLogps
from napo_loss.types import MIN_LENGTH

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Report(NamedTuple):
    kernel: str
    case: str
    target: str
    registers: int
    spills: int  # bytes of local memory (NVIDIA) or spilled registers (AMD)
    shared: int  # bytes
    load_bytes: int  # the widest load from global memory, per lane
    store_bytes: int


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each launcher with the shapes that pick different code: aligned, odd and tiny vocabularies, strided rows."""
    from napo_loss.kernels.linear_block import linear_block
    from napo_loss.kernels.linear_rows import linear_rows
    from napo_loss.kernels.logps_backward import logps_backward
    from napo_loss.kernels.logps_forward import Partials, logps_forward
    from napo_loss.kernels.logps_reduce import logps_reduce
    from napo_loss.kernels.objective import objective
    from napo_loss.kernels.objective_records import Constants, Settings, Switches

    labels = torch.zeros(1, 2, dtype=torch.int64)
    weights = torch.ones(1, 2)
    normalizer, w, grad_sum = torch.zeros(2, 1, 2), torch.zeros(2), torch.zeros(1)

    # Every integer is 1 here, which Triton turns into a constant.
    one = torch.empty(1, 1, 1)
    yield "all ones", lambda: logps_forward(one, labels[:, :1], 1, -100)
    alone = normalizer[..., :1].contiguous()
    shares = Partials(peak=one[0], total=one[0], target=one[0, 0])
    yield "all ones", lambda: logps_reduce(shares, labels[:, :1].contiguous(), None, 1, -100)
    yield (
        "all ones",
        lambda: logps_backward(grad_sum, one, labels[:, :1], None, alone, one, 1, -100),
    )
    for name, dtype in DTYPES.items():
        for V in (1, 50257, 128256):
            logits = torch.empty(1, 2, V, dtype=dtype)
            yield f"{name} V={V}", lambda x=logits: logps_forward(x, labels, 1, -100)
            yield f"{name} V={V}", lambda x=logits: logps_backward(grad_sum, x, labels, None, normalizer, x, 1, -100)
        strided = torch.empty(1, 32000, 2, dtype=dtype).transpose(1, 2)
        yield f"{name} strided", lambda x=strided: logps_forward(x, labels, 1, -100)
        yield (
            f"{name} strided, weights",
            lambda x=strided: logps_backward(grad_sum, x, labels, weights, normalizer, torch.empty(x.shape), 1, -100),
        )
    partials = Partials(peak=torch.empty(3, 2), total=torch.empty(3, 2), target=torch.empty(2))
    for given in (None, weights):
        case = "weights" if given is not None else "no weights"
        yield case, lambda w=given: logps_reduce(partials, labels, w, 1, -100)

    for name, dtype in DTYPES.items():
        for V in (1, 50257, 128256):
            raw = torch.empty(2, V)  # as torch.mm leaves it
            out = raw if dtype == torch.float32 else torch.empty(2, V + -V % 16, dtype=dtype)[:, :V]
            bias = torch.empty(V, dtype=dtype)
            for softcap, given in ((0.0, None), (30.0, bias)):
                case = "softcap, bias, " * (softcap > 0) + f"{name} V={V}"
                head = {"bias": given, "logit_scale": 1.0, "softcap": softcap}
                yield case, lambda r=raw, d=out, h=head: linear_rows(r, labels[0], d, **h)
                yield case, lambda r=raw, d=out, h=head: linear_block(r, labels[0], 0, normalizer[:, 0], w, d, **h)
        plain = {"bias": None, "logit_scale": 1.0, "softcap": 0.0}
        yield f"{name} log-probs only", lambda r=raw, h=plain: linear_rows(r, labels[0], None, **h)
        statistics = lambda r=raw, d=out, h=plain: linear_rows(r, labels[0], d, **h, statistics=True)  # noqa: E731
        yield f"{name} token statistics", statistics

    constants = Constants(eager.MIN_Q, eager.WEIGHT_FLOOR, eager.WEIGHT_PRIOR, eager.MOST_GAIN, MIN_LENGTH)
    for K, B in ((1, 1), (3, 64)):
        row, rows = torch.zeros(B), torch.zeros(K, B)
        for average, dynamic in ((False, False), (True, True)):
            switches = Switches(average, dynamic, COMPUTE_LOSS=True)
            logps = BatchLogps(row, rows, row, rows, row, rows)._asdict()
            settings = Settings(*torch.zeros(6, K))
            yield (
                f"K={K} B={B}" + " average dynamic" * average,
                partial(objective, logps, settings, None, None, constants, switches, beta=0.1),
            )


def record(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` launches, without launching it."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in names if name in kwargs}
        launches.append(Launch(self, arguments, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(launch: Launch, target: GPUTarget):
    """Compiles with the specialisations of a real launch: constants, integers equal to 1, multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if launch.kernel.params[i].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + {torch.int64: "i64", **{v: k for k, v in DTYPES.items()}}[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def inspect(compiled, target: GPUTarget) -> tuple[int, int, int, int, int]:
    """``registers, spills, shared, load_bytes, store_bytes`` of a compiled kernel."""
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        usage = _resource_usage(compiled.asm["cubin"])
        registers, spills = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        widths = {kind: _ptx_width(compiled.asm["ptx"], kind) for kind in ("ld", "st")}
        return registers, spills, shared, widths["ld"], widths["st"]
    text = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
    spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
    return registers, spills, shared, _amd_width(text, "load"), _amd_width(text, "store")


def _resource_usage(cubin: bytes) -> dict[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))


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


def _report(i: int, target: str) -> Report:
    case, launch = _launches()[i]
    compiled = compile_launch(launch, TARGETS[target])
    return Report(launch.kernel.__name__, case, target, *inspect(compiled, TARGETS[target]))


def compile_all(targets: Sequence[str] = tuple(TARGETS)) -> list[Report]:
    """Every case on every target, a process per core. What Triton's cache holds is not compiled again."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated; interpreted kernels do not compile
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all of them
    work = list(product(range(len(_launches())), targets))
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        found = pool.map(_report, *zip(*work, strict=True), chunksize=8)
        return list(tqdm(found, total=len(work), unit="kernel", disable=None))
