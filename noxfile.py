"""The tests on the versions that docs/versions.md names: one session each, in an environment that goes afterwards.

    nox                                   all of them; torch comes with CUDA, some gigabytes for each
    nox -s "versions(torch-2.11)"         one
    python tests/version_table.py         writes what they left in tests/tried into the page

Each leaves a file in tests/tried. Where torch is on the disk or in an index of your own, pip's settings find it.
"""

import json
import platform
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.error_on_missing_interpreters = False
ROOT = Path(__file__).parent
TRIED = ROOT / "tests/tried"
CORE = "objective ops logps linear kernels strides excluded token_statistics faults interrupts contexts package"
EXTRAS = "head trl trl_versions trl_state"
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "build", "setuptools>=77"]
# Python, torch, Triton (None: what torch brings), and of the extras what has to be named.
VERSIONS = [
    nox.param("3.10", "2.8.0", None, None, id="torch-2.8"),
    nox.param("3.12", "2.11.0", None, ["numpy<2.4"], id="torch-2.11"),  # Triton 3.6 and numpy 2.4: docs/versions.md
    nox.param("3.11", "2.13.0", "3.9.0", [], id="torch-2.13"),
    nox.param("3.11", "2.14.1", None, [], id="torch-2.14"),
]
NAMED = ("torch", "triton", "numpy", "trl", "transformers", "peft")


@nox.session(venv_backend="venv")
@nox.parametrize("python,torch,triton,extras", VERSIONS)
def versions(session: nox.Session, torch: str, triton: str | None, extras: list[str] | None) -> None:
    """``extras`` None: the core alone, which Python 3.10 has."""
    try:
        wanted = [f"torch=={torch}", *([f"triton=={triton}"] if triton else ["triton"])]
        session.install(*wanted, *TOOLS, *(extras or []), "--editable", ".[trl]" if extras is not None else ".")
        names = f"{CORE} {EXTRAS}" if extras is not None else CORE
        files = [f"tests/test_{name}.py" for name in names.split()]
        report = Path(session.create_tmp()).resolve() / "report.xml"
        options = ["-m", "not slow", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        session.run(
            "python", "-m", "pytest", *options, *files, *session.posargs,
            env={"OMP_NUM_THREADS": "1"}, success_codes=[0, 1],
        )  # fmt: skip
        found = {**of_environment(session), **of_report(report), "files": names.split()}
        TRIED.mkdir(exist_ok=True)
        path = TRIED / f"python-{found['python']}-torch-{found['torch']}.json".replace("+", "-")
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        if found["failed"]:
            session.error(f"{len(found['failed'])} tests failed: {found['failed']}")
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def of_environment(session: nox.Session) -> dict:
    code = (
        "import json, platform; from importlib.metadata import distributions as d;"
        "print(json.dumps({'python': platform.python_version(), **{x.name.lower(): x.version for x in d()}}))"
    )
    have = json.loads(session.run("python", "-c", code, silent=True) or "{}")
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, CPU",
        "python": have["python"],
        **{name: have.get(name) for name in NAMED},
    }


def of_report(path: Path) -> dict:
    """Counts, the names of what failed, and why tests were skipped."""
    cases = ElementTree.parse(path).getroot().findall(".//testcase")
    bad = [
        f"{x.get('classname')}::{x.get('name')}"
        for x in cases
        if x.find("failure") is not None or x.find("error") is not None
    ]
    skips = Counter(skip.get("message", "") for x in cases if (skip := x.find("skipped")) is not None)
    return {"passed": len(cases) - len(bad) - skips.total(), "failed": bad, "skipped": dict(sorted(skips.items()))}
