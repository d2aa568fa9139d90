"""``python tests/mutation``: see the package's docstring, and ``--help``."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tqdm

from mutation import recorded, report, run, scratch, trace, verdicts

tqdm.tqdm.monitor_interval = 0  # no thread, of which a fork would be a half


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python tests/mutation", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, as many of each file; else all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--files", default="*", metavar="GLOB", help="'napo_loss/logps/*', say; several with commas")
    parser.add_argument("--ids", default="", help="these mutants only, with commas")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", choices=("quick", "all"), default="all", help="those of make test, or all")
    parser.add_argument("--most", type=float, default=float("inf"), metavar="S", help="seconds of tests for a mutant")
    parser.add_argument("--again", action="store_true", help="also those that survived an earlier run")
    parser.add_argument("--stale", action="store_true", help="trace nothing: what was is a hint, survivors provisional")
    parser.add_argument("--with", dest="tried", nargs="+", metavar="TEST", help="only these tests")
    parser.add_argument("--recorded", type=int, metavar="N", help="N killed ones of the table, with their killers only")
    parser.add_argument("--list", action="store_true", help="only name the mutants")
    parser.add_argument("--report", action="store_true", help="only write the report of the verdicts there are")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    tiers = ["quick"] if asked.tests == "quick" else ["quick", "slow"]
    found = run.everything()
    globs = asked.files.split(",")
    chosen = [x for x in found.values() if any(fnmatch.fnmatch(x.file, glob) for glob in globs)]
    if asked.ids:
        chosen = [x for x in chosen if x.id in asked.ids.split(",")]
    if asked.sample is not None:
        chosen = run.sample(chosen, asked.sample, asked.seed)
    if asked.list:
        print(*chosen, sep="\n")
        return 0
    if asked.recorded is not None:
        return recorded.check(found, asked.recorded, asked.seed, asked.jobs)
    if not asked.report:
        _judge(asked, tiers, found, chosen)
    gc.unfreeze()
    return report.write(found, verdicts.past(found, tiers, partial=True), tiers)


def _judge(asked: argparse.Namespace, tiers: list[str], found: dict, chosen: list) -> None:
    scratch.warm()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        scratches = [scratch.Scratch(Path(folder) / str(i)) for i in range(asked.jobs)]
        trace.CACHE.mkdir(parents=True, exist_ok=True)
        if not (asked.stale or asked.tried):
            trace.trace_all(scratches, trace.stale(tiers), tqdm.tqdm.write)
        tests = run.Tests(tiers, asked.stale or bool(asked.tried))
        known = verdicts.past(found, tiers)
        wanted = [x for x in chosen if x.id not in known or (asked.again and known[x.id].outcome != "killed")]
        court = run.Court(scratches, tests, asked.most, partial=bool(asked.tried))
        batches = {x.id: [[test] for test in asked.tried] for x in wanted} if asked.tried else None
        fresh: list[verdicts.Result] = []
        command = f"python tests/mutation {' '.join(sys.argv[1:])}".strip()
        with verdicts.RESULTS.open("a", buffering=1) as results, tqdm.tqdm(total=len(wanted), unit="mutant") as bar:
            for mutant, result in court.try_all(wanted, batches):
                result.command = command
                if result.outcome not in ("killed", "timeout"):
                    tqdm.tqdm.write(f"{result.outcome}: {mutant}")
                fresh.append(result)
                results.write(json.dumps(result.__dict__) + "\n")
                bar.update()
            killers = {x.killer for x in fresh if x.outcome == "killed" and "::" in x.killer and " " not in x.killer}
            if failing := court.control(killers):
                verdicts.forget(failing)
                raise SystemExit(f"these tests fail without a mutant, so their kills are none: {failing}")


if __name__ == "__main__":
    sys.exit(main())
