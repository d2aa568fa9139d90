"""Does noise-aware preference optimization loosen modality bias? A real VLM, real pictures, five minutes on a CPU.

python examples/demo.py             # the table, and results/demo.json, .md and .png
python examples/demo.py --quick     # the same on a toy scale, in seconds

What drives the committed run (docs/demo.md has its table, results/demo.json all numbers):

- Identical answers teach nothing. A biased answer that is right equals the chosen one, so only pairs in which the cue
  is wrong pull, always away from the cue. The rejected term pulls back, and these fixed weights leave it 0.04 only:
  with a third for each term every arm with several negatives gains, with and without noise-awareness.
- Flipped pairs against a right biased answer teach the wrong thing. DPO pulls hardest on what it fits worst, which
  after a while is these; the factor p^q damps them. "Share of the gradient" measures that, at the last weights; it
  depends on beta and the learning rate too, and these differ between arms.
- q is not adaptive for ``image_only``: two-token answers have margins of a few nats, the printed alpha = 0.01 supposes
  hundreds, so q stays at 1 and the term is a plain mean absolute error.

Four seeds cannot tell differences of a few points from chance. How settings were chosen: demo_tune.py.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)
# The model is tiny: threads that spin while they wait cost more than they bring.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for demo.json and demo.png")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds; each has its own model and pairs")
    parser.add_argument("--quick", action="store_true", help="a smoke run: everything small, the numbers mean nothing")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="seeds run side by side")
    args = parser.parse_args()
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")

    from demo_arms import ARMS, QUICK, SCALE
    from demo_report import figure, markdown, summary, table

    started = time.perf_counter()
    scale = QUICK if args.quick else SCALE
    seeds = run_seeds(list(range(args.seeds)), ARMS, scale, "test", args.workers)
    report = {
        "what": "held-out test pictures; means and standard deviations over seeds",
        "scale": asdict(scale),
        "arms": {arm.name: asdict(arm) for arm in ARMS},
        "summary": summary(seeds),
        "seeds": rounded(seeds),
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "demo.md").write_text(markdown(report))
    figure(report, args.out / "demo.png")
    print(table(report))
    print(f"\n{report['seconds']:.0f} s. Written: {args.out / 'demo.json'} and {args.out / 'demo.png'}")


def run_seeds(seeds: list[int], arms: list, scale: Any, split: str, workers: int) -> list[dict[str, Any]]:
    """One process per seed, ``workers`` at a time, one thread each; one progress bar over all of their steps."""
    from tqdm.auto import tqdm

    context = multiprocessing.get_context("spawn")
    total = len(seeds) * (scale.pretrain_steps + len(arms) * scale.steps)
    with context.Manager() as manager, ProcessPoolExecutor(min(workers, len(seeds)), context) as pool:
        ticks = manager.Queue()
        jobs = [pool.submit(run_in_worker, seed, arms, scale, split, ticks) for seed in seeds]
        with tqdm(total=total, desc=f"{len(seeds)} seeds", unit="step", smoothing=0.05) as bar:
            while wait(jobs, timeout=0.5).not_done:
                while not ticks.empty():
                    bar.update(ticks.get())
                failed = [job for job in jobs if job.done() and job.exception()]
                if failed:
                    pool.shutdown(cancel_futures=True)
                    break
            while not ticks.empty():
                bar.update(ticks.get())
        return [job.result() for job in jobs]


def run_in_worker(seed: int, arms: list, scale: Any, split: str, ticks: Any) -> dict[str, Any]:
    from demo_train import run_seed

    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:  # a message per step would be slower than a step is long
            ticks.put(10)

    return run_seed(seed, arms, scale, split, tick)


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 5) if isinstance(x, float) else x


def environment() -> dict[str, Any]:
    from importlib.metadata import version

    packages = ["torch", "transformers", "trl", "datasets", "scikit-learn", "numpy"]
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if (cpuinfo.exists())
        else []
    )
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
