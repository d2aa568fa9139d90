"""What the launchers of the kernels would launch, recorded: the shapes that pick different code, without a GPU.

Every launcher is called once with tensors whose launch is recorded instead of run, so what is compiled from it are the
very specialisations that a GPU would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from benchmarks.pipes import WARP, Element
from napo_loss.objective import eager
from napo_loss.objective.negatives import BatchLogps
from napo_loss.types import MIN_LENGTH

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Cases = Iterator[tuple[str, Callable[[], object]]]


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    def element(self) -> Element | None:
        """What is done per element of a row; None where a row is no longer than a block, so that no loop runs."""
        a = self.arguments
        if "logits_ptr" not in a or a.get("V", a.get("columns")) < 2 * a["BLOCK_V"]:
            return None
        written = a["dlogits_ptr"].element_size() if "dlogits_ptr" in a and a.get("WRITE_DLOGITS", True) else 0
        return Element(
            read=a["logits_ptr"].element_size() + (a["bias_ptr"].element_size() if a.get("HAS_BIAS") else 0),
            written=written,
            lane=a["BLOCK_V"] / (WARP * self.options["num_warps"]),
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


def cases() -> Cases:
    yield from _from_logits()
    yield from _from_hidden()
    yield from _objective()


def _from_logits() -> Cases:
    """Aligned, odd and tiny vocabularies, strided rows."""
    from napo_loss.kernels.logps_backward import logps_backward
    from napo_loss.kernels.logps_forward import Partials, logps_forward
    from napo_loss.kernels.logps_reduce import logps_reduce

    labels = torch.zeros(1, 2, dtype=torch.int64)
    weights = torch.ones(1, 2)
    normalizer, grad_sum = torch.zeros(2, 1, 2), torch.zeros(1)

    # Every integer is 1 here, which Triton turns into a constant.
    one = torch.empty(1, 1, 1)
    yield "all ones", lambda: logps_forward(one, labels[:, :1], 1, -100)
    alone = normalizer[..., :1].contiguous()
    shares = Partials(peak=one[0], total=one[0], target=one[0, 0])
    yield "all ones", lambda: logps_reduce(shares, labels[:, :1].contiguous(), None, 1, -100)
    yield "all ones", lambda: logps_backward(grad_sum, one, labels[:, :1], None, alone, one, 1, -100)
    for name, dtype in DTYPES.items():
        for V in (1, 50257, 128256):
            logits = torch.empty(1, 2, V, dtype=dtype)
            yield f"{name} V={V}", lambda x=logits: logps_forward(x, labels, 1, -100)
            yield f"{name} V={V}", lambda x=logits: logps_backward(grad_sum, x, labels, None, normalizer, x, 1, -100)
        odd = torch.empty(2 * 128256 + 1, dtype=dtype)[1:].view(1, 2, 128256)
        yield f"{name} odd address V=128256", lambda x=odd: logps_forward(x, labels, 1, -100)
        yield (
            f"{name} odd address V=128256",
            lambda x=odd: logps_backward(grad_sum, x, labels, None, normalizer, x, 1, -100),
        )
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


def _from_hidden() -> Cases:
    """What is done to the raw logits, in each dtype of dlogits."""
    from napo_loss.kernels.linear_block import linear_block
    from napo_loss.kernels.linear_rows import linear_rows

    targets, normalizer, w = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2)
    for name, dtype in DTYPES.items():
        for V in (1, 50257, 128256):
            raw = torch.empty(2, V + -V % 16)[:, :V]
            out = raw if dtype == torch.float32 else torch.empty(2, V + -V % 16, dtype=dtype)[:, :V]
            bias = torch.empty(V, dtype=dtype)
            for case, softcap, given in (("", 0.0, None), ("softcap, ", 30.0, None), ("softcap, bias, ", 30.0, bias)):
                head = {"bias": given, "logit_scale": 1.0, "softcap": softcap}
                yield f"{case}{name} V={V}", lambda r=raw, d=out, h=head: linear_rows(r, targets, d, **h)
                yield (
                    f"{case}{name} V={V}",
                    lambda r=raw, d=out, h=head: linear_block(r, targets, 0, normalizer, w, d, **h),
                )
    raw, plain = torch.empty(2, 128256), {"bias": None, "logit_scale": 1.0, "softcap": 0.0}
    yield "log-probs only", lambda: linear_rows(raw, targets, None, **plain)
    out = torch.empty(raw.shape, dtype=torch.bfloat16)
    capped = {**plain, "softcap": 30.0}
    for case, head in (("bf16 token statistics", plain), ("softcap, bf16 token statistics", capped)):
        yield case, lambda h=head: linear_rows(raw, targets, out, **h, statistics=True)


def _objective() -> Cases:
    from napo_loss.kernels.objective import objective
    from napo_loss.kernels.objective_records import Constants

    constants = Constants(eager.MIN_Q, eager.WEIGHT_FLOOR, eager.WEIGHT_PRIOR, eager.MOST_GAIN, MIN_LENGTH)
    for K, B in ((1, 1), (3, 64)):
        row, rows = torch.zeros(B), torch.zeros(K, B)
        for average, dynamic in ((False, False), (True, True)):
            logps = BatchLogps(row, rows, row, rows, row, rows)._asdict()
            settings, both = torch.zeros(6, K), torch.zeros(1 + K, B)
            out = {"losses": row, "rewards": both, "dlogps": both, "found": torch.zeros(4, K)}
            yield (
                f"K={K} B={B}" + " average dynamic" * average,
                partial(
                    objective, logps, settings, None, None, out, constants, average=average, dynamic=dynamic, beta=0.1
                ),
            )
