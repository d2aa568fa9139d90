"""What a model does to the logits after its output projection, read off from the model itself.

Configs say it under a dozen names, and some models ignore what their text config says. So the model's own code is shown
logits that we chose (:func:`ramp`), and what comes out says what was done (:func:`solve`): nothing, a scale, a softcap,
or something that this library does not compute, which is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

POWERS = (0, -4, 9, 3, -2, 6, -1, 4, 1, 7, -3, 5, 2, 8)
"""Of two, in the ramp: exact in every dtype, from the straight part of a softcap to its ends; a small vocabulary has
the first of them."""
SMALL = 3
"""Where the ramp has 2⁻⁴."""
FULL = 1e-6
"""Rounding below which a number that was read off can be taken as it is."""
SLACK = 4
"""Roundings of its dtype that a processed logit may be away from ours: scale, quotient, tanh and product make one."""


class Processing(NamedTuple):
    """``z = softcap·tanh(y/softcap)``, ``y = logit_scale·raw``, as in :func:`napo_loss.linear_sequence_logps`."""

    logit_scale: float | None = None
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        y = raw if self.logit_scale is None else raw * self.logit_scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)


def ramp(V: int, like: Tensor) -> Tensor:
    """Logits ``[V]`` to be shown: powers of two of both signs and 0, over and over."""
    values = [0.0, *(sign * 2.0**power for power in POWERS for sign in (1, -1))]
    return torch.tensor(values, dtype=like.dtype, device=like.device).repeat(-(-V // len(values)))[:V]


def solve(
    shown: Tensor,  # [V]
    seen: Tensor,  # [..., V]: what the model made of them
    config: Any,
    name: str,
) -> Processing:
    """What ``seen`` says of the model called ``name``.

    In half precision a number can only be read to three digits; so those of the config (and 1, their reciprocals and
    roots) are tried, and in full precision one that was read. Raises ``NotImplementedError``, with what was seen.
    """
    if seen.shape[-1:] != shown.shape:
        raise NotImplementedError(
            f"{name} does not give one logit for each row of its output projection: {shown.shape[0]} rows, logits of "
            f"shape {list(seen.shape)}"
        )
    rows, x = seen.double().reshape(-1, seen.shape[-1]).cpu(), shown.double().cpu()
    eps = max(torch.finfo(seen.dtype).eps, torch.finfo(shown.dtype).eps)

    def wrong(found: Processing) -> Tensor:
        expected = found(x)
        return ((rows - expected).abs() > SLACK * eps * expected.abs()).any(0) | ~rows.isfinite().all(0)

    best: tuple[int, Processing] | None = None
    for found in _candidates(x, rows[0], config, eps):
        off = int(wrong(found).sum())
        if off == 0:
            return found
        if best is None or off < best[0]:
            best = off, found
    off, found = best or (len(x), Processing())
    at = int(wrong(found).nonzero()[0])
    done = ", ".join(f"{field}={value:.6g}" for field, value in found._asdict().items() if value is not None)
    raise NotImplementedError(
        f"fused_head does not reproduce what {name} does to its logits: {off} of {len(x)} are not explained by "
        f"{done or 'leaving them as they are'} (in column {at} it makes {rows[0, at]:.6g} of {x[at]:.6g}). Use "
        "sequence_logps(model(**inputs).logits, labels) for this model"
    )


def _candidates(
    shown: Tensor,  # [V]
    seen: Tensor,  # [V]
    config: Any,
    eps: float,
) -> Iterator[Processing]:
    """The likeliest first, from what became of a small logit."""
    small = min(SMALL, len(shown) - 1)
    x, z = float(shown[small]), float(seen[small])
    numbers = sorted(set(_numbers(config)))
    scales = sorted({1.0, *numbers, *(1 / v for v in numbers), *(v**0.5 for v in numbers), *(v**-0.5 for v in numbers)})
    for cap in (None, *numbers):
        if x == 0 or not (z and (math.isfinite(z) if cap is None else abs(z) < cap)):
            continue
        read = z / x if cap is None else cap * math.atanh(z / cap) / x
        room = SLACK * eps / (1 - (z / cap) ** 2 if cap else 1)  # atanh is steep near the cap
        near = sorted((s for s in scales if abs(s - read) <= room * s), key=lambda s: (s != 1, abs(s - read)))
        yield from (Processing(None if s == 1 else s, cap) for s in near)
        if eps < FULL:
            yield Processing(read, cap)
    yield Processing()


def _numbers(config: Any) -> Iterator[float]:
    """Every positive number of a config, those of its parts included."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        if isinstance(values, (int, float)) and not isinstance(values, bool) and 0 < values < math.inf:
            yield float(values)
        return
    for value in values:
        yield from _numbers(value)


def check(
    ours: Tensor,  # [N, k]: log-probs of some columns
    logits: Tensor,  # [N, V]: the model's, of the same positions
    columns: Tensor,  # [N, k]
    dtype: torch.dtype,  # of the projection's output, whose rounding a model keeps that casts its logits afterwards
    name: str,
) -> bool:
    """Whether there was something to compare; an error where the model's log-probs are others than ours."""
    z = logits.detach().double()
    right = z.log_softmax(-1).gather(-1, columns)
    if not (right.isfinite().all() and ours.isfinite().all()):
        return False
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(dtype).eps)
    room = 1e-3 + SLACK * eps * z.abs().amax(-1, keepdim=True)
    if ((ours.double() - right).abs() > room).any():
        worst = (ours.double() - right).abs().flatten().argmax()
        raise NotImplementedError(
            f"fused_head does not reproduce the logits of {name}: of one of its positions the log-prob of a token is "
            f"{right.flatten()[worst]:.6g}, and {ours.flatten()[worst]:.6g} from its output projection's weight. A "
            "subclass or a hook may change them. Use sequence_logps(model(**inputs).logits, labels) for this model"
        )
    return True
