"""README stays true: its code runs, its links lead somewhere, its tables are those of the files they come from."""

import re
from pathlib import Path

import pytest
import torch

import scale

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_code(text: str) -> dict:
    """The names that are left after the Python blocks ran one after the other."""
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "code block", "exec"), namespace)
    return namespace


def test_the_code_runs_when_pasted():
    found = run_code(README)
    assert found["logits"].grad is not None
    assert found["out"].q.shape == (2,)


def test_the_code_on_scale_runs_in_one_process():
    found = run_code((ROOT / "docs/scale.md").read_text())
    plain = found["linear_sequence_logps"](found["hidden"], found["weight"], found["labels"]).pairs()
    torch.testing.assert_close(found["chosen"], plain[0])
    assert found["q"].dim() == 0


@pytest.mark.parametrize("name", ["README.md", "docs/scale.md", "DESIGN.md"])
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / name).read_text()):
        assert ((ROOT / name).parent / target).exists(), target


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


def test_the_table_on_scale_is_what_its_script_prints():
    assert scale.table() in (ROOT / "docs/scale.md").read_text(), "run python docs/scale.py and paste the table again"
