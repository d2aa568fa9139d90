"""A differential fuzzer of the public functions: a case from each seed, compared with plain float64 formulas.

``python -m tests.fuzz``, or ``make fuzz``; docs/fuzz.md has the last report.
"""
