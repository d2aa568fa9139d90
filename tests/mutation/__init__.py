"""Mutation testing of the library itself: is there a test for each thing the code says?

``python tests/mutation`` changes one thing in a copy of the tree (``<`` to ``<=``, a constant to the next, a statement
to nothing), runs the tests that execute the changed lines, and reports what no test noticed. ``make mutants`` does so
with every mutant there is, which takes a night or two; ``--sample`` with some of each file.

Ours, since what there is does not serve here. mutmut mutates functions by trampolines that hold all mutants at once,
which Triton, reading a kernel's source, compiles or interprets as written; cosmic-ray and mutatest start an interpreter
for each mutant, ten seconds of torch, transformers and TRL before the first test, and run all tests for each. So:

- :mod:`mutation.mutate` finds mutants by ``ast`` and splices their text into the file, so that whoever reads the source
  reads the mutant; their ids survive edits elsewhere.
- :mod:`mutation.trace` runs every test once under a tracer (other processes too) to learn which lines it executes. What
  is learnt is used only as long as every file it depends on is the same.
- :mod:`mutation.scratch` keeps one warm process per run that has imported everything but this library, and forks a
  child for each mutant, in a copy of the tree: processes that a test starts meet the mutant too.
- :mod:`mutation.run` judges, :mod:`mutation.verdicts` keeps, :mod:`mutation.report` writes. Tests that killed something
  are run once more without a mutant: one that fails then has noticed nothing.
- :mod:`mutation.recorded` is what `make test-all` has time for: do tests that once killed a mutant kill it still?
"""
