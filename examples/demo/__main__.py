"""Does noise-aware preference optimization loosen modality bias? A real VLM and real pictures, in minutes on two cores.

python -m examples.demo             # the table, and runs/demo: demo.json, demo.md and demo.png
python -m examples.demo --quick     # the same on a toy scale, in seconds: the numbers mean nothing
python -m examples.demo --seeds 10 --out examples/results    # what docs/demo.md shows, its table pasted there
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m examples.demo"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the table, figure and numbers")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds; each has its own model and pairs")
    parser.add_argument("--quick", action="store_true", help="a smoke run: everything small, the numbers mean nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="seeds run side by side")
    args = parser.parse_args()
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")

    from examples.demo import arms, report
    from examples.demo.seeds import run_seeds
    from examples.noise_study.results import machine

    started = time.perf_counter()
    scale = arms.QUICK if args.quick else arms.SCALE
    compared = arms.chosen()
    seeds = run_seeds(list(range(args.seeds)), compared, scale, "test", args.workers)
    report.write(args.out, report.Report(scale, compared, seeds, time.perf_counter() - started, machine()))


if __name__ == "__main__":
    main()
