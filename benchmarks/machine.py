"""The machine under a measurement: names, versions, and the two rates that floors are made of.

The rates are measured in the run that uses them: a data sheet knows neither the clock of today nor the neighbours.
"""

from __future__ import annotations

import platform
import re
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, GPU, quantiles, time_steps

ROOT = Path(__file__).parent.parent
PEERS = ("trl", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn", "quack-kernels")


def file_stem() -> str:
    """The name of this device's files."""
    return re.sub(r"[^\w.]+", "-", torch.cuda.get_device_name() if GPU else f"{platform.machine()}-CPU")


@lru_cache
def describe() -> dict[str, str]:
    """``device, driver, torch, triton, peers, commit`` as the CSV's columns have them."""
    return {
        "device": torch.cuda.get_device_name() if GPU else f"{cpu_model()}, {torch.get_num_threads()} threads",
        "driver": _gpu_driver() if GPU else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": ", ".join(f"{name} {_version(name)}" for name in PEERS),
        "commit": commit(),
    }


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else 'CPU'}, {platform.machine()}"


def _gpu_driver() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"{driver}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit, with a ``+`` where tracked files differ from it (results aside)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!examples/results"
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@lru_cache
def cache_bytes() -> int:
    """The last cache before memory: inputs that rotate must together be larger."""
    if GPU:
        return torch.cuda.get_device_properties(0).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().rstrip("K")) * 1024 if path.exists() else 64 * 2**20


@lru_cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy much larger than the cache."""
    source = torch.ones(max(2**28, 2 * cache_bytes()), dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


@lru_cache
def gemm_rate(dtype: str) -> float:
    """FLOP per second of a large product of random numbers (zeros draw less power and clock higher)."""
    n = 8192 if GPU else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, dtype))
    return 2 * n**3 / _seconds(lambda: a @ a)


def _seconds(step) -> float:
    step()
    samples = time_steps({"": step}, 0.5)[""]
    return 1e-3 * quantiles(samples)[1]
