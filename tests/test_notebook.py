"""examples/napo_loss.ipynb: committed without outputs, and its cells run one after the other in a fresh process."""

import json
import sys
from pathlib import Path

import pytest

import processes
from processes import ROOT

PATH = Path(ROOT, "examples/napo_loss.ipynb")
NOTEBOOK = json.loads(PATH.read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    for i, code in enumerate(CODE):
        compile(code, f"cell {i}", "exec")  # plain Python: no magic of a kernel's


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(links) >= 3
    assert all((PATH.parent / link).exists() for link in links)


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path):
    """Without a kernel: what Jupyter adds (magics, display) the notebook has none of."""
    cells = tmp_path / "cells.json"
    cells.write_text(json.dumps(CODE))
    program = (
        "import json, sys\n"
        "names = {'__name__': '__main__'}\n"
        "for i, code in enumerate(json.load(open(sys.argv[1]))):\n"
        "    exec(compile(code, f'cell {i}', 'exec'), names)\n"
    )
    done = processes.run([sys.executable, "-c", program, cells])
    assert done.returncode == 0, done.stderr[-3000:]
    for seen in (
        "losses",
        "q = 1.0: pull",
        "30 % swapped: released 0.62, moment 0.60",
        "NaPO, moment: q",
        "image_only:",
    ):
        assert seen in done.stdout, seen
