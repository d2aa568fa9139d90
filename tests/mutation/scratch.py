"""A copy of the tree, and children forked from a process that has imported what takes long."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil

ROOT = Path(__file__).parents[2]
HEAVY = (
    "hypothesis", "numpy", "PIL.Image", "pytest", "torch", "torch.distributed.tensor", "triton", "triton.language",
    "torch.library", "accelerate", "datasets", "peft", "tokenizers", "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava", "trl.trainer.dpo_trainer",
)  # fmt: skip
MEMORY = 12 * 2**30
"""Bytes of addresses that a process may have: some mutants ask for all there is, and the system would end others."""
LOOK = 5.0
"""Seconds between two looks at what a child has used."""


def files() -> list[str]:
    """What git would put into a commit of the tree as it is."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    return sorted({name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()})


class Scratch:
    """A copy of the tree in ``folder``, one file of which can be another for a while."""

    def __init__(self, folder: Path):
        self.root, self.temporary, self.log = folder / "tree", folder / "tmp", folder / "log"
        self.changes = int(time.time())
        for name in files():
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)

    def write(self, name: str, source: bytes) -> None:
        """With a time of its own, by which Python tells that compiled code is of another source."""
        self.changes += 2
        (self.root / name).write_bytes(source)
        os.utime(self.root / name, (self.changes, self.changes))

    def restore(self, name: str) -> None:
        self.write(name, (ROOT / name).read_bytes())

    def fork(self, function: Callable, *args) -> Child:
        """Runs ``function(*args)`` in the copy, in a process group of its own; what it returns is the exit code."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)  # a mutant's failing examples are not the next's
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._child(function, args)
        return Child(pid, started)

    def _child(self, function: Callable, args: tuple) -> None:
        code = 70
        try:
            os.setpgrp()  # not a session: the system may share its cores by sessions
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            others = [x for x in sys.path if x and (x.startswith(sys.prefix) or not x.startswith(str(ROOT)))]
            sys.path[:] = [str(self.root), *others]  # .venv may lie in the checkout
            sys.modules["__main__"] = ModuleType("__main__")  # what processes that a test spawns would import first
            sys.path_importer_cache.clear()
            importlib.invalidate_caches()
            os.environ.update(PYTHONPATH=str(self.root), TMPDIR=str(self.temporary), OMP_NUM_THREADS="1")
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what a test starts would compile all anew
            sys.dont_write_bytecode, tempfile.tempdir = False, None
            code = function(*args)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@dataclass
class Child:
    """A forked process and whatever it started."""

    pid: int
    started: float
    limit: float = float("inf")  # seconds of all cores
    patience: float = float("inf")  # seconds in which all sleep
    used: float = 0.0  # seconds of all cores, at the last look
    moved: float = 0.0  # when they last grew
    looked: float = 0.0

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def late(self) -> str:
        """Whether it has "used" its limit, or stands "still": neither is a matter of how busy the machine is."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return ""
        used, sleeps = 0.0, True
        for process in self.family():
            with suppress(psutil.Error):
                used += sum(process.cpu_times()[:4])
                sleeps &= process.status() == psutil.STATUS_SLEEPING  # one that waits for a core is not asleep
        if not self.looked or not sleeps or abs(used - self.used) > 0.1:
            self.used, self.moved = used, now
        self.looked = now
        return "used" if used > self.limit else "still" if now - self.moved > self.patience else ""

    def family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []

    def kill(self) -> None:
        for process in self.family():
            with suppress(psutil.Error):
                process.kill()
        os.waitpid(self.pid, 0)

    def reap(self) -> None:
        """Ends what the child left behind in its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def warm() -> None:
    """Imports what tests need, as conftest would have it imported, but not this library. No thread may have started."""
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("conftest")  # sets the environment that imports read
    del sys.modules["conftest"]
    for name in HEAVY:
        importlib.import_module(name)
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    found = [name for name in sys.modules if name.split(".")[0] == "napo_loss"]
    assert not found, f"the warm process has imported {found}"
    gc.collect()
    gc.freeze()  # children do not copy these pages to count references
