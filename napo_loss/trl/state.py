"""The smoothed moments, which q is read from, in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

STATE_FILE = "napo_state.json"


def save_moments(folder: Path, names: list[str], moments: Tensor | None) -> None:
    """Writes ``[2, K]`` by the negatives' names, where there is anything to keep."""
    if moments is not None:
        named = dict(zip(names, moments.t().tolist(), strict=True))
        (folder / STATE_FILE).write_text(json.dumps({"moments": named}))


def load_moments(checkpoint: str | None, names: list[str], device: torch.device) -> Tensor | None:
    """``[2, K]`` for these negatives, or None where the checkpoint holds none."""
    if checkpoint is None or not (path := Path(checkpoint, STATE_FILE)).exists():
        return None
    named = json.loads(path.read_text())["moments"]
    if set(named) != set(names):
        raise ValueError(f"{path} holds moments for {list(named)}, but the negatives are {names}")
    return torch.tensor([named[name] for name in names], device=device).t().contiguous()
