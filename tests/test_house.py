"""The house stands: imports run downwards only, without a circle; the plan is drawn from the code itself."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "napo_loss"
FLOORS = [
    {"_version", "trees", "types", "checks", "backend", "reference"},
    {"parallel"},
    {"objective", "logps"},  # neither knows of the other
    {"hf"},
    {"trl"},
]
APART = {"bias"}  # works on datasets and models, needs nothing of the rest
TOP = {"napo_loss"}  # the public names
KERNELS = {"kernels"}  # reached only by the operators, when they launch one


def files() -> dict[str, Path]:
    """Every module but the kernels, by its name inside the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "kernels":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "napo_loss"] = path
    return found


def imported(tree: ast.AST) -> set[str]:
    """What a file imports from the package, anywhere in it: inside functions and TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from napo_loss.logps import ops` names a module, `from napo_loss.types import LowRank` a thing in one.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("napo_loss.") for name in found if name.split(".")[0] == "napo_loss"}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """For every module those that it imports."""

    def module_of(name: str) -> str:
        while name not in sources and not name.startswith("kernels"):
            assert "." in name, f"{name} is no module of the package"
            name = name.rpartition(".")[0]
        return name

    return {name: {module_of(x) for x in imported(ast.parse(text))} - {name} for name, text in sources.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise AssertionError(f"{module} is in no room of the plan")


def faults(found: dict[str, set[str]]) -> list[str]:
    """Imports that run upwards, sideways into another room, or in a circle."""
    bad = []
    for module, used in found.items():
        for other in sorted(used):
            if room(other) in KERNELS:
                if module.rpartition(".")[2] not in ("ops", "linear_ops", "sharded"):
                    bad.append(f"{module} reaches the kernels ({other}), which only operators may")
            elif room(module) in TOP:
                continue
            elif room(module) in APART or room(other) in APART | TOP:
                if room(module) != room(other):
                    bad.append(f"{module} imports {other}, from which it stands apart")
            elif room(module) != room(other) and floor(other) >= floor(module) > 0:
                bad.append(f"{module} imports {other}, which is not below it")
            elif floor(module) == 0 and floor(other) > 0:
                bad.append(f"{module}, on the ground, imports {other}")
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        bad.append(f"a circle: {' -> '.join(error.args[1])}")
    return bad


def test_imports_run_downwards_without_a_circle():
    assert faults(graph({name: path.read_text() for name, path in files().items()})) == []


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("types", "from napo_loss.objective.loss import napo_loss", "types, on the ground, imports objective.loss"),
        ("checks", "from napo_loss.types import LowRank", "a circle: "),
        (
            "objective.eager",
            "from napo_loss.logps import gemm",
            "objective.eager imports logps.gemm, which is",
        ),
        (
            "hf.head",
            "if TYPE_CHECKING:\n    from napo_loss.trl import NaPOTrainer",
            "hf.head imports trl, which is",
        ),
        ("logps.eager", "def f():\n    import napo_loss.kernels.launch", "logps.eager reaches the kernels"),
        ("bias.cache", "from napo_loss import types", "bias.cache imports types, from which it stands apart"),
        ("logps.tokens", "from napo_loss.logps import linear", "a circle: "),
        ("trl.data", "from napo_loss import napo_loss", "trl.data imports napo_loss, from which it stands apart"),
    ],
)
def test_a_wrong_import_is_found(module, line, message):
    sources = {name: path.read_text() for name, path in files().items()}
    if module == "checks":
        sources["types"] += "\nfrom napo_loss import checks"
    sources[module] += "\n" + line
    assert any(message in fault for fault in faults(graph(sources)))


def test_the_ground_floor_is_small_and_no_name_is_a_corridor():
    top = [path.stem for path in PACKAGE.glob("*.py")]
    assert len(top) <= 8
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    for name in top:
        assert not any(name.startswith(f"{other}_") for other in rooms), f"{name} belongs inside a room"


def test_only_its_room_knows_trl():
    for name, path in files().items():
        tree = ast.parse(path.read_text())
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        if room(name) != "trl":
            assert not any(module.split(".")[0] == "trl" for module in modules), name


def test_no_union_is_asked_for_where_torch_may_trace():
    """torch 2.8 compiles ``isinstance(x, (A, B))``, and on Python 3.10 not ``isinstance(x, A | B)``."""
    for name, path in files().items():
        if room(name) not in {"trl", "bias", "hf"}:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                    assert not isinstance(node.args[1], ast.BinOp), f"{name}: {ast.unparse(node)}"
