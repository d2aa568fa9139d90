"""Imports what memory is not measured of, in the process from which fresh ones are forked."""

# pyright: reportMissingImports=false

from contextlib import suppress

import benchmarks.end_to_end
import benchmarks.linear
import benchmarks.logits  # noqa: F401

for peer in ("trl.trainer.dpo_trainer", "liger_kernel.chunked_loss", "torch._inductor.compile_fx"):
    with suppress(ImportError):
        __import__(peer)
