"""The mutants themselves, the map from lines to tests, the list of equivalents, and a sample of those once killed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil")
import processes
from mutation import hits, recorded, report, run, trace, verdicts
from mutation.mutate import mutants

SOURCE = '''"""x < 1"""
from __future__ import annotations


def f(x: int = 3, *, mode: str = "sum") -> int | None:
    """Not x < 2."""
    if x < 2 and not done:
        raise ValueError(f"x < {x}, {1 + 1}")
    y: int = max(x, 2.5)
    total += g(y, "text", flag=True)
    return -1


class C:
    size = 4

    def __repr__(self):
        return 1 + 1
'''


def found(source: str) -> dict[str, list[str]]:
    """By line of text, what is made of it."""
    made: dict[str, list[str]] = {}
    for mutant in mutants("f.py", source.encode()):
        changed = mutant.apply(source.encode()).decode()
        compile(changed, "f.py", "exec")
        old, new = source.splitlines(), changed.splitlines()
        different = [(a.strip(), b.strip()) for a, b in zip(old, new, strict=True) if a != b]
        assert len(different) == 1, "one change each"
        made.setdefault(different[0][0], []).append(different[0][1])
    return made


def test_what_is_changed_and_what_is_not():
    made = found(SOURCE)
    assert set(made["if x < 2 and not done:"]) == {
        "if (not (x < 2 and (not done))):", "if (x < 2 or not done):", "if (not done):", "if (x < 2):",
        "if (x <= 2) and not done:", "if (x >= 2) and not done:", "if x < 3 and not done:", "if x < 4 and not done:",
        "if x < 2 and (done):",
    }  # fmt: skip
    assert made['raise ValueError(f"x < {x}, {1 + 1}")'] == ["pass"]
    assert set(made["y: int = max(x, 2.5)"]) == {"y: int = min(x, 2.5)", "y: int = max(x, 5.0)"}
    assert set(made['total += g(y, "text", flag=True)']) == {
        "pass", "total -= g(y, 'text', flag=True)", "total += g(y, 'text')", 'total += g(y, "text", flag=False)',
    }  # fmt: skip
    assert set(made["return -1"]) == {"return None", "return (1)", "return 0", "return (-2)"}
    assert set(made["size = 4"]) == {"size = 5", "size = 8"}
    header = 'def f(x: int = 3, *, mode: str = "sum") -> int | None:'
    assert {line.partition("(")[2].partition(")")[0] for line in made[header]} == {
        "x: int = 4, *, mode: str = \"sum\"", "x: int = 6, *, mode: str = \"sum\"", "x: int = 3, *, mode: str = 'sum_'",
    }  # fmt: skip
    assert len(made) == 7  # no docstring, annotation, message or __repr__


def test_ids_survive_edits_elsewhere():
    before = {x.id: str(x).partition(" [")[2] for x in mutants("f.py", SOURCE.encode())}
    moved = SOURCE.replace("class C", "def between():\n    return x < 2\n\n\nclass C").replace(
        "    y: int", "\n    y: int"
    )
    after = {x.id: str(x).partition(" [")[2] for x in mutants("f.py", moved.encode())}
    assert before.items() <= after.items()
    assert len(before) < len(after)
    edited = {x.id for x in mutants("f.py", SOURCE.replace("x < 2 and", "x < 3 and").encode())}
    assert len(before.keys() - edited) == 8  # of that condition, but for what is made of `not done`


def test_every_mutant_of_the_library_has_an_id_of_its_own_and_can_be_read():
    count = sum(len(mutants(name, (trace.ROOT / name).read_bytes())) for name in trace.library())
    assert len(run.everything()) == count > 5000
    chosen = run.sample(run.everything().values(), 60, seed=1)
    for mutant in chosen:
        compile(mutant.apply((trace.ROOT / mutant.file).read_bytes()), mutant.file, "exec")
    assert len({mutant.file for mutant in chosen}) >= 55  # evenly
    assert run.sample(run.everything().values(), 60, seed=1) == chosen
    assert {x.file.split("/")[0] for x in chosen} == {"napo_loss", "kernels"}


def test_lines_are_seen_in_every_process(tmp_path):
    """Of the package only; a process that a test starts writes a file of its own."""
    for name in ("napo_loss", "kernels", "hits"):
        (tmp_path / name).mkdir()
    (tmp_path / "napo_loss" / "code.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(hits.__file__).parents[1])!r})\n"
        f"from mutation import hits; now = hits.Now(hits.Path({str(tmp_path / 'hits')!r}))\n"
        f"import importlib.util as u; s = u.spec_from_file_location('c', {str(tmp_path / 'napo_loss' / 'code.py')!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"hits.start({str(tmp_path / 'hits')!r}, {str(tmp_path)!r})\n"
        "m.f(1); now.set(5); m.f(int(sys.argv[1])); now.set(0); m.f(0)\n"
    )
    for argument in ("0", "1"):
        subprocess.run([sys.executable, "-c", program, argument], check=True)
    assert len(list((tmp_path / "hits").glob("*.hits"))) == 2
    assert hits.read(tmp_path / "hits") == {5: {("napo_loss/code.py", line) for line in (1, 2, 3, 4)}}


def test_what_was_traced_holds_only_while_its_files_are_the_same():
    files = {name: trace.digest(name) for name in ("tests/draws.py", "napo_loss/trees.py")}
    assert trace.Traced({}, [], {}, files).fresh()
    assert not trace.Traced({}, [], {}, files | {"napo_loss/trees.py": "another"}).fresh()
    assert not trace.Traced({}, [], {}, files | {"tests/no_such.py": "0"}).fresh()
    assert set(trace.BESIDE) <= {path.stem for path in (trace.ROOT / "tests").glob("test_*.py")}


def test_equivalents_exist_and_have_reasons():
    everything, listed = run.everything(), report.equivalents()
    assert report.faults(everything, {}, listed) == []
    for id, entry in listed.items():
        mutant = everything[id]
        assert entry["where"].startswith(mutant.file)
        assert len(entry["reason"].split()) >= 4


def test_an_equivalent_that_is_gone_or_killed_is_said():
    everything = {x.id: x for x in mutants("f.py", SOURCE.encode())}
    one, other = list(everything)[:2]
    listed = {id: {"where": "f.py: f", "change": "x < 2", "reason": "none"} for id in (one, other, "0123456789")}
    bad = report.faults(everything, {one: "killed", other: "survived"}, listed)
    assert len(bad) == 2
    assert re.search(f"noticed .killed.: {one}", bad[0])
    assert "no such mutant any more: 0123456789" in bad[1]


def test_verdicts_hold_as_long_as_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "RESULTS", tmp_path / "results.jsonl")
    everything = run.everything(["napo_loss/trees.py"])
    killed, survivor, gone = [*list(everything)[:2], "0123456789"]
    killer, whole = "tests/test_mutation.py::test_ids_survive_edits_elsewhere", verdicts.whole_state("quick")
    holds = verdicts.killed_state(everything[killed], killer)

    def read(*rows, partial=False):
        results = [verdicts.Result(id, outcome, killer, 1, 1.0, state) for id, outcome, state in rows]
        verdicts.RESULTS.write_text("".join(json.dumps(x.__dict__) + "\n" for x in results))
        return {id: x.outcome for id, x in verdicts.past(everything, ["quick"], partial).items()}

    rows = (killed, "killed", holds), (survivor, "survived", whole), (gone, "killed", holds)
    assert read(*rows) == {killed: "killed", survivor: "survived"}
    assert read((killed, "survived", whole), *rows, (killed, "survived", whole))[killed] == "killed"
    lapsed = (killed, "killed", "of other code"), (survivor, "survived", "of other tests")
    assert read(*lapsed) == {}
    assert read(*lapsed, partial=True) == {survivor: "survived"}
    assert read((survivor, "survived", whole + verdicts.PARTIAL)) == {}
    read(*rows)
    verdicts.forget([killer])
    assert verdicts.RESULTS.read_text() == ""


def test_the_table_is_of_this_code():
    rows, everything = recorded.kills(), run.everything()
    assert len(rows) >= 80
    assert sum(row["id"] in everything for row in rows) >= recorded.LEAST * len(rows)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_what_was_killed_is_killed_still():
    """Of every room some; how long it takes, and on how busy a machine, changes no verdict."""
    pytest.importorskip("trl")
    done = processes.run([sys.executable, "tests/mutation", "--recorded", "14", "--jobs", "1"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("killed in ") >= 12
