"""What a user installs: the wheel, its imports, and that importing stays light; an sdist that can test itself."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import api

ROOT = Path(__file__).parent.parent
LINK = "napo_loss/kernels"
pytestmark = pytest.mark.filterwarnings("default")  # build backends warn about themselves


@pytest.fixture(scope="module", autouse=True)
def no_pythonpath():
    """What is tested is what was installed, whatever else the caller has on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


def python(code: str, executable: str | Path = sys.executable, **kwargs) -> str:
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git_files(*flags: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, which says what to package; this is no checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z", *flags], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout: a build must not leave folders in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in git_files("--cached", "--others", "--exclude-standard"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def unlinked(source, tmp_path_factory):
    """The copy as Git writes it without symbolic links: a text file that names the target."""
    folder = tmp_path_factory.mktemp("unlinked") / "source"
    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (folder / LINK).unlink()
    (folder / LINK).write_text("../kernels")
    return folder


@pytest.fixture(scope="module")
def built(request, tmp_path_factory):
    """The wheel and the sdist that it was built from; of a release, those that are to be released."""
    folder = Path(os.environ.get("NAPO_LOSS_DIST") or tmp_path_factory.mktemp("dist"))
    if "NAPO_LOSS_DIST" not in os.environ:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
        subprocess.run([*command, request.getfixturevalue("source")], check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_holds_one_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"napo_loss"}
    assert "napo_loss/kernels/logps_forward.py" in names
    assert "napo_loss/py.typed" in names
    assert "napo_loss/kernels/__init__.py" not in names
    assert not any(name.startswith("napo_loss/kernels/kernels") for name in names)


def test_every_room_is_in_the_wheel(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    rooms = {path.parent.name for path in ROOT.glob("napo_loss/*/__init__.py")}
    assert {"objective", "logps", "parallel", "hf", "trl", "bias"} <= rooms
    expected = {path.relative_to(ROOT).as_posix() for path in modules()}
    expected |= {f"napo_loss/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert expected == {name for name in names if name.endswith(".py")}


def test_the_metadata_is_complete(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found = Parser().parsestr(archive.read(name).decode())
    assert found["Name"] == "napo-loss"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == ">=3.10"
    assert found["Summary"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert {"DPO", "Triton"} <= set(found["Keywords"].split(","))
    classifiers = found.get_all("Classifier")
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert {"trl", "demo", "bench", "test", "dev"} <= set(found.get_all("Provides-Extra"))
    for topic in ("Operating System", "Intended Audience", "Development Status", "Typing"):
        assert any(classifier.startswith(f"{topic} :: ") for classifier in classifiers), topic
    addresses = dict(url.split(", ") for url in found.get_all("Project-URL"))
    assert addresses == {"Paper": "https://arxiv.org/abs/2503.17928"}, "the project itself has no address yet"
    (license_file,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_is_the_repository(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert set(git_files("--cached")) - names == {LINK}, "MANIFEST.in says what goes in"


@pytest.mark.slow
def test_the_sdist_tests_itself(built, tmp_path):
    """All tests are found, and those that run have what they need, the kernels too."""
    shutil.unpack_archive(built[1], tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for arguments in (["--collect-only"], ["tests/test_ops.py", "-k", "opcheck"]):
        done = subprocess.run([*run, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "error" not in done.stdout.splitlines()[-1], done.stdout


def installed(folder: Path, *target: str | Path) -> Path:
    """The interpreter of a fresh environment with the target in it, which borrows this one's torch and triton."""
    venv.create(folder, with_pip=False)
    executable = folder / "bin/python"
    borrowed = python("import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)").strip()
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", executable, "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *flags, *target], check=True, capture_output=True)
    return executable


PLACES = "import napo_loss, napo_loss.kernels.logps_forward as k; print(napo_loss.__file__, k.__file__, sep='\\n')"
slow = pytest.mark.slow


def outside(places: str, *roots: Path) -> list[str]:
    return [path for path in places.split("\n") if path and not any(Path(path).is_relative_to(root) for root in roots)]


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        ("wheel", True),
        pytest.param("sdist", True, marks=slow),
        pytest.param("wheel", False, marks=slow),
    ],
)
def test_an_installed_package_imports_its_kernels(built, kind, link, tmp_path, request):
    target = built[kind == "sdist"] if link else request.getfixturevalue("unlinked")
    executable = installed(tmp_path / "env", target)
    assert outside(python(PLACES, executable, cwd=tmp_path), tmp_path / "env") == []


@pytest.mark.slow
@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("mode", ["lenient", "compat", "strict"])
def test_an_editable_install_imports_its_kernels(mode, link, tmp_path, request):
    """With the link and without. Strict mode links file by file, from a folder of its own inside the source."""
    folder = request.getfixturevalue("source" if link else "unlinked")
    executable = installed(tmp_path / "env", "--editable", folder, "--config-settings", f"editable_mode={mode}")
    assert outside(python(PLACES, executable, cwd=tmp_path), folder) == []


def test_a_checkout_without_links_imports_its_kernels(unlinked, tmp_path):
    places = python(PLACES, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(unlinked)})
    assert outside(places, unlinked) == []
    assert str(unlinked / "kernels/logps_forward.py") in places


@pytest.mark.slow
def test_a_pythonpath_of_the_caller_does_no_harm(tmp_path):
    """Nothing on it reaches what is built and installed here."""
    git_files()
    for name in ("build", "setuptools", "napo_loss"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} of another checkout')")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "installed and wheel-True",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_import_is_light():
    loaded = python(
        "import sys, napo_loss; print(' '.join(sys.modules))", cwd=ROOT.parent, env={"PYTHONPATH": str(ROOT)}
    )
    for heavy in ("triton", "trl", "transformers", "datasets", "napo_loss.trl", "napo_loss.bias"):
        assert heavy not in loaded.split(), f"import napo_loss loads {heavy}"


def test_every_public_name_is_documented():
    import napo_loss

    for name in napo_loss.__all__:
        thing = getattr(napo_loss, name)
        if callable(thing):
            assert thing.__doc__, name
    for name in ("sequence_logps", "noise_level", "noise_aware_dpo_loss", "napo_loss"):
        doc = getattr(napo_loss, name).__doc__
        for part in ("Args:", "Returns:", "Raises:", "Example:", ">>>", "Source:"):
            assert part in doc, f"{name} lacks {part}"


@pytest.mark.parametrize("package", api.PACKAGES)
def test_public_names_and_signatures_are_those_that_are_kept(package):
    if package == "napo_loss.trl":
        pytest.importorskip("trl")
    kept = re.findall(
        rf"^((?:class |def )?{package}\.[A-Z_a-z]\w*(?![.\w]).*\n(?:  .*\n)*)", api.KEPT.read_text(), re.M
    )
    assert "".join(kept).splitlines() == api.lines(package), (
        "the API has changed: say so in CHANGELOG.md, then python tests/api.py > tests/api.txt"
    )


def modules() -> list[Path]:
    return [p for p in ROOT.glob("napo_loss/**/*.py") if "kernels" not in p.parts]


def test_files_and_signatures_stay_small():
    for path in [*modules(), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert len(path.read_text().splitlines()) <= 250, f"{path.name} is over 250 lines"
