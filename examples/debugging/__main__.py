"""Trains what the page shows, writes the CSV, the figure and the tables, and pastes these into the page."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm.auto import tqdm

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
        started = time.process_time()  # a shared machine's wall says little
        jobs = [(name, seed) for seed in range(args.seeds) for name in WAYS]
        rows = [row for name, seed in tqdm(jobs, unit="run") for row in run(name, seed, args.steps)]
        page.write_rows(args.out, rows, time.process_time() - started)
    page.write(args.out)


if __name__ == "__main__":
    main()
