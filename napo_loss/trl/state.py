"""The smoothed moments, which q is read from, in a checkpoint."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE_FILE = "napo_state.json"
ROUNDING = 1e-3
"""By how much of itself a mean square may lie below the square of its mean: both are smoothed in float32."""


def save_moments(folder: Path, names: list[str], moments: Tensor | None) -> None:
    """Writes ``[2, K]`` by the negatives' names, where there is anything to keep; whole or not at all."""
    if moments is not None:
        named = dict(zip(names, moments.t().tolist(), strict=True))
        path, new = folder / STATE_FILE, folder / f"{STATE_FILE}.new"
        try:
            new.write_text(json.dumps({"moments": named}))
            os.replace(new, path)
        except OSError as error:
            new.unlink(missing_ok=True)
            told = f"{error.strerror}: the moments that q is read from are not saved"
            raise OSError(error.errno, told, str(path)) from error


def load_moments(checkpoint: str | None, names: list[str], device: torch.device, *, smoothed: bool) -> Tensor | None:
    """``[2, K]`` for these negatives; None without a checkpoint, or where it holds none, which is worth a warning if
    they are ``smoothed``: q then starts anew."""
    if checkpoint is None:
        return None
    path = Path(checkpoint, STATE_FILE)
    if not path.exists():
        if smoothed:
            warnings.warn(f"{path} does not exist: the moments that q is read from start anew", stacklevel=2)
        return None
    named = _parse(path)
    if set(named) != set(names):
        raise ValueError(f"{path} holds moments for {list(named)}, but the negatives are {names}")
    return torch.tensor([_moments(path, name, named[name]) for name in names], device=device).t().contiguous()


def _parse(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is no JSON ({error}): remove it, and q starts anew") from None
    named = found.get("moments") if isinstance(found, dict) else None
    if not isinstance(named, dict):
        raise ValueError(f'{path} must hold {{"moments": {{name: [mean, square]}}}}, got {str(found)[:80]!r}')
    return named


def _moments(path: Path, name: str, given: Any) -> list[float]:
    """Mean and mean square. Where one is not finite a single pair was excluded, and the loss knows how to go on."""
    numbers = isinstance(given, list) and len(given) == 2 and all(type(x) in (int, float) for x in given)
    if not numbers:
        raise ValueError(f"{path}: the moments of {name!r} must be [mean, mean square], got {given!r}")
    mean, square = map(float, given)
    if math.isfinite(mean) and math.isfinite(square) and square * (1 + ROUNDING) < mean * mean:
        raise ValueError(f"{path}: no margins have the mean {mean} and the mean square {square}, which {name!r} has")
    return [mean, square]
