"""Processes that tests start: they find this checkout first, whatever PYTHONPATH says, and none outlives its test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**given: str | None) -> dict[str, str]:
    """This process's variables, but for those ``given`` (None takes one away): one thread, and the checkout first.

    What PYTHONPATH held stays behind the checkout, since somebody's torch may be there. A test of an installed package
    takes the variable away instead: the checkout would hide what it looks for.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **given}
    return {name: value for name, value in merged.items() if value is not None}


def run(command: Sequence, *, cwd: Path = ROOT, **given: str | None) -> subprocess.CompletedProcess[str]:
    """Runs to the end, however long a busy machine takes. What hangs ends with the test that pytest's limit stops."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command)], cwd=cwd, env=environment(**given), **pipes) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            process.terminate()  # a launcher ends its ranks, which it could not do if it were killed
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
