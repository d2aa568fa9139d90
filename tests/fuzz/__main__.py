"""``python -m tests.fuzz --cases 20000``, ``--replay SEED``: see ``--help``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated: they run here, whatever the machine has
    sys.path.insert(0, str(Path(__file__).parent.parent))  # helpers of tests are found as pytest finds them

from .cases import Case, drawn
from .compare import FEW
from .report import Tally, written
from .running import Failure, Runner, batch, kept
from .spaces import SPACES

BATCH = 25
"""Cases that a process takes at a time."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20000, help="how many (20000)")
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow (0)")
    parser.add_argument("--function", choices=list(SPACES), help="only this one")
    parser.add_argument("--alone", action="store_true", help="no case that needs several processes")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one case, and make it simpler where it fails")
    parser.add_argument("--report", type=Path, help="write a page, such as docs/fuzz.md")
    return parser.parse_args()


def batches(given: argparse.Namespace) -> Iterator[list[tuple[Case, Failure | None]]]:
    parts = [
        range(at, min(at + BATCH, given.seed + given.cases))
        for at in range(given.seed, given.seed + given.cases, BATCH)
    ]
    if given.jobs == 1:
        yield from (batch(part, given.function, given.alone) for part in parts)
        return
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(batch, part, given.function, given.alone) for part in parts]):
            yield done.result()


def replay(seed: int, function: str | None) -> int:
    runner, case = Runner(), drawn(seed, function)
    print(case)
    failure = runner.failure(case)
    runner.stop()
    if failure is None:
        print("right")
        return 0
    print(f"wrong: {failure.message}\nsimplest: {failure.simplest}")
    return 1


def main() -> int:
    given = arguments()
    if given.replay is not None:
        return replay(given.replay, given.function)
    from tqdm import tqdm

    tally = Tally()
    with tqdm(total=given.cases, unit="case", mininterval=5) as bar, suppress(KeyboardInterrupt):
        for part in batches(given):  # what is interrupted reports what it has done
            for case, failure in part:
                tally.add(case, failure)
                if failure is not None:
                    tqdm.write(f"{failure.case}\n  {failure.message}\n  simplest: {failure.simplest}")
            bar.update(len(part))
    if given.report is not None:
        command = " ".join(["python -m tests.fuzz", *sys.argv[1:]])
        given.report.write_text(written(tally, command, FEW))
    if given.jobs == 1:
        kept().stop()
    print(f"{tally.cases} cases, {len(tally.failures)} wrong")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
