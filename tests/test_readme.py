"""README stays true: its code runs, its links lead somewhere, its tables are those of the files they come from."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs_when_pasted():
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].grad is not None
    assert namespace["out"].q.shape == (2,)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_module_is_listed():
    for path in [*ROOT.glob("napo_loss/*.py"), *ROOT.glob("kernels/*.py")]:
        if path.name.startswith("_"):
            continue
        assert path.stem in README, f"{path} has no line in README"


PASTED = sorted(set(re.findall(r"<!-- (\S+\.md) -->", README)))  # by `python -m benchmarks`


@pytest.mark.parametrize("path", ["examples/results/demo.md", *PASTED])
def test_tables_are_those_of_the_files(path):
    table = (ROOT / path).read_text().strip()
    assert table in README, f"README's table differs from {path}: paste it again"


def test_every_table_of_the_cpu_is_shown():
    tables = ROOT.glob("benchmarks/results/x86_64-CPU-*.md")
    assert sorted(path.relative_to(ROOT).as_posix() for path in tables) == PASTED
