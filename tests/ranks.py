"""Processes that stay: a gloo group of four, of which a test uses the first two, three or all, as often as it likes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from hypothesis import Phase
from torch.distributed.tensor.debug import CommDebugMode

import draws
from napo_loss.objective import loss as objective

NEVER = timedelta(days=1)
"""A collective waits for its slowest rank. What hangs, pytest's own limit ends: it stops the ranks, too."""


def examples(count: int):
    """Settings of hypothesis for tests of ranks: a failing example costs a new set of processes, so none is shrunk."""
    return draws.examples(count, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@contextmanager
def objective_is(fused: bool):
    """The objective as a kernel, interpreted here, or in tensor operations; processes of a pool outlive a test."""
    original, objective._can_fuse = objective._can_fuse, lambda *_: fused
    try:
        yield
    finally:
        objective._can_fuse = original


class Ranks:
    """``run(W, function, *args)`` calls ``function(group, *args)`` on W ranks; what one raises, it raises."""

    def __init__(self, size: int = 4):
        self.size = size
        self.processes: list = []
        self.pipes: list = []

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = f"{self.folder.name}/store"
        for rank in range(self.size):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead process is an end of file
            self.processes.append(process)
            self.pipes.append(mine)

    def run(self, W: int, function: Callable, *args) -> list:
        if not self.processes:
            self.start()
        found: list = [None] * W
        try:
            for pipe in self.pipes[:W]:
                pipe.send((W, function, args))
            waiting = list(range(W))
            while waiting:
                for pipe in wait([self.pipes[rank] for rank in waiting]):
                    rank = self.pipes.index(pipe)
                    error, found[rank] = pipe.recv()
                    if error:
                        raise AssertionError(f"rank {rank} of {W}:\n{error}")
                    waiting.remove(rank)
        except BaseException:
            self.stop()  # the others may wait for a rank that has given up
            raise
        return found

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
            self.folder.cleanup()
        self.processes, self.pipes = [], []


def serve(rank: int, size: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=NEVER)
    groups = {W: dist.new_group(list(range(W)), timeout=NEVER) for W in range(1, size)} | {size: dist.group.WORLD}
    while True:
        try:
            W, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(groups[W], *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


class Wire(CommDebugMode):
    """Counts collectives and the bytes of the tensors they are given."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.bytes += sum(x.nbytes for x in args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)
