"""Measures every public function against what users would pick instead, and leaves a CSV, a figure and tables.

Suites: logits, linear, objective, end_to_end, and static, which compiles the kernels and needs no GPU. Without a name
all run (static where there is no GPU). Results are written to benchmarks/results, those of --quick to runs/, and their
tables into docs/benchmarks.md where it names them; a suite that runs again replaces its rows, and Ctrl-C keeps what was
measured. A run is bounded: see benchmarks/runner.py.
"""

import argparse
import sys
from pathlib import Path

SUITES = ("logits", "linear", "objective", "end_to_end", "static")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="few, small shapes for a short time each")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="print ratios to these; fail on a regression")
    parser.add_argument("--with", type=Path, dest="new", metavar="NEW.csv", help="compare these and run nothing")
    parser.add_argument("--check", action="store_true", help="static: write nothing, fail where kernels got worse")
    parser.add_argument("--targets", nargs="+", metavar="sm_90", help="static --check: for these only, not for all")
    parser.add_argument("--without", metavar="fp16", help="static --check: without cases whose name holds this word")
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite called {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if arguments.new and not arguments.compare:
        parser.error("--with needs --compare")
    if arguments.check and arguments.suites != ["static"]:
        parser.error("--check is for static alone")
    if (arguments.targets or arguments.without) and not arguments.check:
        parser.error("--targets and --without are for --check alone: the table has all of them")

    from benchmarks.record import compare, read_rows

    for path in filter(None, (arguments.compare, arguments.new)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    old = read_rows(arguments.compare) if arguments.compare else []  # a run may write over this file
    status = 0
    if arguments.new:
        rows = read_rows(arguments.new)
    else:
        from benchmarks.measure import GPU
        from benchmarks.suite import run_suites

        chosen = arguments.suites or [s for s in SUITES if s != "static" or not (GPU or arguments.quick)]
        timed = [suite for suite in chosen if suite != "static"]
        rows = run_suites(timed, quick=arguments.quick) if timed else []
        if "static" in chosen:
            from benchmarks.compiled import TARGETS
            from benchmarks.static import run_static

            if unknown := set(arguments.targets or ()) - set(TARGETS):
                parser.error(f"no target called {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
            status = run_static(check=arguments.check, targets=arguments.targets, without=arguments.without)
    if arguments.compare:
        lines, regressions = compare(old, rows)
        print(*lines or ["no case in common"], sep="\n")
        if regressions:
            print("Lost ground beyond the spread:", *regressions, sep="\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
