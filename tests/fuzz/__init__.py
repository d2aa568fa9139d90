"""A differential fuzzer of the public functions: ``python -m tests.fuzz`` draws a case from each seed and compares it with
plain float64 formulas that import nothing of the package (``make fuzz``; docs/fuzz.md has the last report)."""
