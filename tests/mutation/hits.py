"""Which lines a test executes, in its own process and in those that it starts; the standard library only.

Every process that finds ``MUTATION_HITS`` in its environment traces itself (``sitecustomize`` of a traced run calls
:func:`start`) and appends what it meets first, ``test file line``, to a file of its own: so a process that is killed
has lost nothing. The number of the test that runs lies in memory that all of them map.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path
from struct import Struct

VARIABLE = "MUTATION_HITS"
NOBODY = 0  # between tests, while modules are imported
NUMBER = Struct("I")


class Now:
    """The number of the test that runs, for all processes."""

    def __init__(self, folder: Path):
        path = folder / "now"
        if not path.exists():
            path.write_bytes(NUMBER.pack(NOBODY))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), NUMBER.size)

    def get(self) -> int:
        return NUMBER.unpack_from(self.memory)[0]

    def set(self, number: int) -> None:
        NUMBER.pack_into(self.memory, 0, number)


def start(folder: str, root: str) -> None:
    """Traces this process from here on: the lines of ``root``'s napo_loss and kernels."""
    now = Now(Path(folder))
    inside = tuple(os.path.realpath(os.path.join(root, name)) + os.sep for name in ("napo_loss", "kernels"))
    names: dict[str, str | None] = {}
    seen: dict[int, set] = defaultdict(set)
    out = open(os.path.join(folder, f"{os.getpid()}.hits"), "a", buffering=1)  # noqa: SIM115  as long as the process

    def name_of(path: str) -> str | None:
        real = os.path.realpath(path)
        names[path] = os.path.relpath(real, os.path.realpath(root)) if real.startswith(inside) else None
        return names[path]

    def line(frame, event, arg):
        test, key = now.get(), (frame.f_code.co_filename, frame.f_lineno)
        if key not in seen[test]:
            seen[test].add(key)
            if test != NOBODY:
                out.write(f"{test}\t{names[key[0]]}\t{key[1]}\n")
        return line

    def call(frame, event, arg):
        path = frame.f_code.co_filename
        if (names[path] if path in names else name_of(path)) is None:
            return None
        return line(frame, event, arg)

    threading.settrace(call)
    sys.settrace(call)


def read(folder: Path) -> dict[int, set[tuple[str, int]]]:
    """What all processes of a run have met, by the number of the test."""
    found: dict[int, set] = defaultdict(set)
    for path in folder.glob("*.hits"):
        for row in path.read_text().splitlines():
            parts = row.split("\t")
            if len(parts) == 3 and parts[2].isdigit():  # not the line that a killed process was writing
                found[int(parts[0])].add((parts[1], int(parts[2])))
    return found
