"""What the tests stand on: processes find this checkout and its helpers first, whatever else there is, and end."""

import os
import signal
import subprocess
import sys

import pytest

import processes


def test_the_checkout_comes_first_and_the_rest_stays(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert processes.environment()["PYTHONPATH"] == f"{processes.ROOT}{os.pathsep}/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    found = processes.environment(HOME=None, NAME="value")
    assert found["PYTHONPATH"] == str(processes.ROOT)
    assert "HOME" not in found
    assert found["NAME"] == "value"


def test_what_a_test_started_ends_with_it(monkeypatch):
    started = []

    def interrupted(process):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", "import time; time.sleep(1e6)"])
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.slow
def test_packages_that_are_called_like_our_folders_change_nothing(tmp_path):
    """Some wheels install a top-level ``tests`` or ``docs``. Ranks, which import a test module anew, do not meet it."""
    for name in ("tests", "docs", "benchmarks", "examples", "napo_loss"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} of somebody else')")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for arguments in (
        ["--collect-only"],
        ["tests/test_vocabulary.py", "-k", "what_is_exchanged"],
        ["tests/test_benchmarks.py", "-k", "fresh_process"],
        ["tests/test_demo.py", "-k", "results"],
    ):
        done = processes.run([*pytest_here, *arguments], PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stdout[-3000:]
