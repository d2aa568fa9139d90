"""``python -m benchmarks static|logits|linear``: see each module."""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    static = suites.add_parser("static", help="compile every kernel for every target: no GPU needed")
    static.add_argument("--check", action="store_true", help="write nothing; fail on a spill or a narrow load")
    logits = suites.add_parser("logits", help="time and memory of sequence_logps against its peers")
    logits.add_argument("--quick", action="store_true", help="the smallest shape only")
    linear = suites.add_parser("linear", help="hidden states to gradients: time, memory and accuracy against its peers")
    linear.add_argument("--quick", action="store_true", help="a tiny shape, and nothing is written")
    arguments = parser.parse_args()
    if arguments.suite == "static":
        from benchmarks.static import run_static

        raise SystemExit(run_static(check=arguments.check))
    if arguments.suite == "linear":
        from benchmarks.linear import run_linear

        return run_linear(quick=arguments.quick)
    from benchmarks.logits import run_logits

    run_logits(quick=arguments.quick)


if __name__ == "__main__":
    main()
