"""What a user installs: the wheel's contents, its imports, and that importing stays light."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("default")  # build backends warn about themselves


def python(code: str, *flags: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from a copy: a build must not leave folders in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))


def test_the_wheel_holds_one_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"napo_loss"}
    assert "napo_loss/kernels/logps_forward.py" in names
    assert "napo_loss/py.typed" in names
    assert "napo_loss/kernels/__init__.py" not in names
    assert not any(name.startswith("napo_loss/kernels/kernels") for name in names)


def test_the_sdist_holds_the_kernels_and_the_licence(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"kernels/logps_forward.py", "napo_loss/types.py", "LICENSE", "pyproject.toml"} <= names


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable", "editable-strict", "editable-compat"])
def test_an_installed_package_imports_its_kernels(built, kind, tmp_path):
    """In a fresh environment that borrows this one's torch, triton and setuptools, away from the checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    executable = tmp_path / "env/bin/python"
    borrowed = python("import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)").strip()
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    source = built[0].parent.parent / "source"
    target = {"wheel": [built[0]], "sdist": [built[1]]}.get(kind, ["--editable", source])
    if "-" in kind:
        target += ["--config-settings", f"editable_mode={kind.split('-')[1]}"]
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", executable, "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *flags, *target], check=True, capture_output=True)
    code = "import napo_loss, napo_loss.kernels.logps_forward as k; print(napo_loss.__file__, k.__file__, sep='\\n')"
    done = subprocess.run([executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root = source if "editable" in kind else site
    strict = source / "build"  # strict mode links file by file from a folder of its own
    for path in map(Path, done.stdout.split()):
        assert path.is_relative_to(root) or path.is_relative_to(strict), path


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


def modules() -> list[Path]:
    return [p for p in ROOT.glob("napo_loss/**/*.py") if "kernels" not in p.parts]


def test_files_and_signatures_stay_small():
    for path in [*modules(), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert len(path.read_text().splitlines()) <= 250, f"{path.name} is over 250 lines"
