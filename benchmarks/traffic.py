"""Bytes that the kernels move, counted: what they really load and store, against what has to be moved.

Triton's interpreter runs the kernels here as they are, with every load and store counted: its elements that are not
masked, times their size. What a cache saves is not subtracted, so this bounds the traffic from above; a memory
transaction's unused ends are not added.

    python -m benchmarks.traffic

prints the counts as JSON. A process of its own: the interpreter is chosen when a kernel is decorated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch


class Traffic(NamedTuple):
    case: str
    read: int  # bytes
    written: int
    floor: int  # bytes that have to be moved

    @property
    def ratio(self) -> float:
        return (self.read + self.written) / self.floor


class Counter:
    """Counts what the interpreter loads and stores while it is entered."""

    def __init__(self) -> None:
        self.read = self.written = 0

    def __enter__(self) -> Counter:
        from triton.runtime.interpreter import interpreter_builder as builder

        self.builder, load, store = builder, builder.create_masked_load, builder.create_masked_store

        # Loads and stores without a mask come through these two, with one that is all true.
        def counted_load(pointers, mask, *rest):
            found = load(pointers, mask, *rest)
            self.read += int(mask.data.sum()) * found.data.itemsize
            return found

        def counted_store(pointers, value, mask, *rest):
            self.written += int(mask.data.sum()) * value.data.itemsize
            return store(pointers, value, mask, *rest)

        vars(builder).update(create_masked_load=counted_load, create_masked_store=counted_store)
        return self

    def __exit__(self, *_) -> None:
        del self.builder.create_masked_load, self.builder.create_masked_store


SHARES = (0.05, 0.1, 0.3, 1.0)
"""Of the positions, those that count."""


def cases(shares: Sequence[float] = SHARES) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call and floor. Few rows: then a row is split most, and the partial sums are the largest share."""
    from napo_loss.kernels.linear_block import linear_block
    from napo_loss.kernels.linear_rows import linear_rows
    from napo_loss.logps import ops
    from napo_loss.logps.calls import LogitsCall

    N, T = 1, 21
    for V, dtype in ((32064, torch.bfloat16), (50257, torch.float32), (128256, torch.bfloat16)):
        logits = torch.zeros(N, T, V, dtype=dtype)
        for c in shares:
            labels = torch.zeros(N, T, dtype=torch.int64)
            labels[:, : round((1 - c) * T)] = -100
            active = int((labels[:, 1:] != -100).sum())
            L, row = logits.nbytes, V * dtype.itemsize
            size = f"{str(dtype).removeprefix('torch.')} V={V} c={c}"

            def path(logits=logits, labels=labels):
                schema = LogitsCall(logits, labels, backend="triton").to_schema()
                _, _, normalizer = ops.sequence_logps(**schema)
                ops.sequence_logps_backward(torch.ones(N), normalizer, **schema)

            yield f"from logits, {size}", path, 2 * active * row + L

    rows, V = 4, 128256
    targets = torch.zeros(rows, dtype=torch.int64)
    raw, dlogits = torch.zeros(rows, V), torch.empty(rows, V, dtype=torch.bfloat16)
    w, moved = torch.ones(rows), raw.nbytes + dlogits.nbytes
    head = {"bias": None, "logit_scale": 1.0, "softcap": 0.0}
    yield "linear_rows, log-probs only", lambda: linear_rows(raw, targets, None, **head), raw.nbytes
    yield "linear_rows, with dlogits", lambda: linear_rows(raw, targets, dlogits, **head), moved
    yield "linear_block", lambda: linear_block(raw, targets, 0, torch.zeros(2, rows), w, dlogits, **head), moved


def count(shares: Sequence[float] = SHARES) -> list[Traffic]:
    found = []
    for case, call, floor in cases(shares):
        with Counter() as counter:
            call()
        found.append(Traffic(case, counter.read, counter.written, floor))
    return found


if __name__ == "__main__":
    print(json.dumps(count()))
