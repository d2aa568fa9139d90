"""Runs a case, and makes one that fails simpler."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ranks import Ranks

from . import chain, estimates, groups, logps, module, objective
from .cases import Case, drawn
from .spaces import GROUPS, SPACES

ALONE: dict[str, Callable[[Case], None]] = {
    "sequence_logps": logps.run,
    "linear_sequence_logps": logps.run,
    "noise_aware_dpo_loss": objective.run_fixed,
    "napo_loss": objective.run_napo,
    "NaPOLoss": module.run,
    "margin_moments": estimates.run_moments,
    "noise_level": estimates.run_noise,
    "likely_swapped": estimates.run_swapped,
    "chain": chain.run,
}


@dataclass
class Failure:
    """A case that is wrong, the simplest that was found to be wrong too, and what is wrong with it."""

    case: Case
    simplest: Case
    message: str


class Runner:
    """Runs cases; processes are started for the first that needs them."""

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = Ranks() if ranks is None else ranks
        self.owns = ranks is None

    def wrong(self, case: Case) -> str | None:
        """What is wrong with it, or None."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's, where the interpreter computes with infinities
                if case.function in GROUPS:
                    self.ranks.run(case.options["W"], groups.run, case)
                else:
                    ALONE[case.function](case)
        except Exception as error:
            lines = traceback.format_exception_only(error)
            return "".join(lines).strip().splitlines()[-1] if case.function in GROUPS else "".join(lines).strip()
        return None

    def failure(self, case: Case) -> Failure | None:
        message = self.wrong(case)
        if message is None:
            return None
        simplest = self.shrunk(case)
        return Failure(case, simplest, self.wrong(simplest) or message)

    def shrunk(self, case: Case, most: int = 60) -> Case:
        """Each option at its simplest, as long as something is wrong."""
        space, tried = SPACES[case.function], 0
        if case.function in GROUPS:
            most = 12  # a failure costs a new set of processes
        for name in case.relevant():
            for value in dict.fromkeys(space[name]):
                if value == case.options[name] or tried >= most:
                    break
                tried += 1
                simpler = case.changed(**{name: value})
                if simpler.options[name] == value and self.wrong(simpler):
                    case = simpler
                    break
        return case

    def stop(self) -> None:
        if self.owns:
            self.ranks.stop()


def batch(seeds: range, function: str | None, alone: bool) -> list[tuple[Case, Failure | None]]:
    """In a process of its own, which keeps its runner, and the ranks of that, for the next batch. Not in ``__main__``:
    of a package, a spawned process does not find it there."""
    torch.set_num_threads(1)
    runner = kept()
    cases = [drawn(seed, function) for seed in seeds]
    return [(case, runner.failure(case)) for case in cases if not (alone and case.function in GROUPS)]


@cache
def kept() -> Runner:
    """One for the process."""
    return Runner()
