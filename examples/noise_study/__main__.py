"""Trains what the CSV lacks, then writes figures and tables; Ctrl-C keeps what is done, the same command goes on."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm.auto import tqdm

from examples.noise_study import results
from examples.noise_study.plan import plan, quick
from examples.noise_study.training import Run, train_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.noise_study")
    parser.add_argument("--quick", action="store_true", help="a minute; written to runs/, the numbers mean nothing")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to this number")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing, write figures and tables")
    parser.add_argument("--out", type=Path, help="folder of the CSV")
    args = parser.parse_args()
    folder = args.out or (Path("runs/noise_study") if args.quick else results.FOLDER)
    if not args.report:
        runs = quick() if args.quick else list(plan(range(args.seeds)))
        run_all(runs, folder, args.workers)
    from examples.noise_study.page import write

    write(folder)


def run_all(runs: list[Run], folder: Path, workers: int) -> None:
    path, started = folder / "runs.csv", time.perf_counter()
    rows = results.read(path)
    counts = results.done(rows)
    whole = {run.key for run in runs if counts[run.key] == len(run.epochs)}
    known = {run.key for run in runs}
    kept = [row for row in rows if (key := results.key_of(row)) in whole or key not in known]
    results.rewrite(path, kept)
    todo = list(dict.fromkeys(run for run in runs if run.key not in whole))
    try:
        with tqdm(total=len(todo), unit="run", desc="noise study", smoothing=0.02) as bar:
            for run, found in _trained(todo, workers):
                results.append(path, run, found)
                bar.update()
    finally:
        if todo:
            results.note_machine(folder, time.perf_counter() - started)


def _trained(todo: list[Run], workers: int) -> Iterator[tuple[Run, list[dict]]]:
    """Runs that share a model and its pairs go to one process, which makes them once."""
    together = [list(runs) for _, runs in groupby(todo, lambda run: (run.task, run.noise, run.rate, run.seed))]
    with ProcessPoolExecutor(max(1, workers), get_context("spawn")) as pool:
        jobs = [pool.submit(train_all, runs) for runs in together]
        try:
            for job in as_completed(jobs):
                yield from job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
