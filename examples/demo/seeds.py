"""Seeds side by side: a process of one thread for each, one progress bar for all of their steps."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

from tqdm.auto import tqdm

from examples.demo.training import Arm, Scale, run_seed


def run_seeds(seeds: list[int], arms: list[Arm], scale: Scale, split: str, workers: int) -> list[dict[str, Any]]:
    """What ``run_seed`` finds for each; one that fails ends them all."""
    context = multiprocessing.get_context("spawn")
    steps = len(seeds) * (scale.pretrain_steps + len(arms) * len(scale.swapped) * scale.steps)
    with context.Manager() as manager, ProcessPoolExecutor(min(workers, len(seeds)), context) as pool:
        ticks = manager.Queue()
        jobs = [pool.submit(_run, seed, arms, scale, split, ticks) for seed in seeds]
        with tqdm(total=steps, desc=f"{len(seeds)} seeds", unit="step", smoothing=0.05) as bar:
            while wait(jobs, timeout=0.5).not_done:
                while not ticks.empty():
                    bar.update(ticks.get())
                if any(job.done() and job.exception() for job in jobs):
                    pool.shutdown(cancel_futures=True)
                    break
            while not ticks.empty():
                bar.update(ticks.get())
        return [job.result() for job in jobs]


def _run(seed: int, arms: list[Arm], scale: Scale, split: str, ticks: Any) -> dict[str, Any]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:  # a message per step would be slower than a step is long
            ticks.put(10)

    return run_seed(seed, arms, scale, split, tick)
