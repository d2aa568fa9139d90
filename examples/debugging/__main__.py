"""Trains what the page shows, writes the CSV, the figure and the tables, and pastes these into the page."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from examples.debugging import page
from examples.debugging.runs import SEEDS, STEPS, WAYS, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.debugging")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds 0 to this number")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=page.FOLDER, help="folder of the CSV")
    args = parser.parse_args()
    if not args.report:
        started = time.perf_counter()
        # By seed, so that whoever trains a second way of one has its reference.
        jobs = [(name, seed, args.steps) for seed in range(args.seeds) for name in WAYS]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            rows = [row for rows in pool.map(run, *zip(*jobs, strict=True)) for row in rows]
        page.write_rows(args.out, rows, time.perf_counter() - started)
    page.write(args.out)


if __name__ == "__main__":
    main()
