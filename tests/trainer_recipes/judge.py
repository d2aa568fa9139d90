"""Whether a recipe did what the page says, from what its ranks wrote down, and the table of those that did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

ROUNDING = 2e-6
"""Nats: a loss near 0.7 in float32, from log-probs that two heads added up differently."""


class Verdict(NamedTuple):
    recipe: str
    versions: dict[str, str]
    difference: float  # from the trainer's own loss, at q = 0
    q: float  # at the last step
    moved: float

    def line(self, environment: str) -> str:
        first, *others = [f"{name} {number}" for name, number in self.versions.items() if number and name != "torch"]
        cells = environment, self.recipe, first, ", ".join(others) or "–"
        return f"| {' | '.join(cells)} | {self.difference:.1e} | {self.q:.4f} | {self.moved:.2g} |"


HEAD = ["| environment | recipe | ran with | beside | q = 0 | q | moved |", "|---|---|---|---|---:|---:|---:|"]


def judge(folder: Path, recipe: str, ranks: int = 2) -> Verdict:
    """Raises AssertionError with what was wrong."""
    found = [json.loads((folder / f"{recipe}-{rank}.json").read_text()) for rank in range(ranks)]
    difference = 0.0
    for rank in found:
        assert len(rank["runs"]["q0"].get("calls", [0, 0])) >= 2, "the recipe's loss was not called with q = 0"
        theirs, q0, ours = (rank["runs"][name] for name in ("theirs", "q0", "ours"))
        assert len(theirs["losses"]) == len(q0["losses"]) >= 2, "the trainer's own loss and q = 0 took other steps"
        assert len(set(theirs["losses"])) > 1, "the loss never changed"
        difference = max(difference, *(abs(a - b) for a, b in zip(theirs["losses"], q0["losses"], strict=True)))
        assert ours["moved"] > 1e-4, "the weights did not move"
        assert len(ours["calls"]) >= 2, "the recipe's loss was not called"
    assert difference <= ROUNDING, f"at q = 0 the loss is {difference:.1e} from the trainer's own"
    calls = [rank["runs"]["ours"]["calls"] for rank in found]
    for step in zip(*calls, strict=True):
        assert all(rank["q"] == step[0]["q"] for rank in step), f"ranks have different q: {[r['q'] for r in step]}"
        for k, q in enumerate(step[0]["q"]):
            mean = sum(rank["own"][k] for rank in step) / ranks
            alpha = step[0].get("alpha", 0.01)
            expected = min(1.0, max(0.001, 2 / (1 + math.exp(alpha * mean))))
            assert abs(q - expected) < 1e-5, f"q is {q}, of the margins of all ranks {expected}"
    last = [call[-1] for call in calls]
    assert last[0]["own"] != last[-1]["own"] or ranks == 1, "ranks had the same pairs: this shows nothing"
    assert last[0]["q"][0] < 1, "q never left 1: margins did not grow"
    return Verdict(recipe, found[0]["versions"], difference, last[0]["q"][0], found[0]["runs"]["ours"]["moved"])


def rows_of(table: Path) -> dict[tuple[str, str], str]:
    """Lines by environment and recipe."""
    lines = table.read_text().splitlines()[2:] if table.exists() else []
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {(environment, recipe): line for line, (environment, recipe, *_) in zip(lines, cells, strict=True)}
