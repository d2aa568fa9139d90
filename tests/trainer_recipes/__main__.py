"""``python -m tests.trainer_recipes [trainer ...] [--newest]``: every recipe of docs/trainers.md in its trainer.

For each trainer an environment in ``.venvs/`` with the versions of ``requirements/<trainer>.txt``, two gloo ranks, and
a verdict; then the table, here and on the page. ``--newest`` installs the newest releases instead, writes no table, and
fails with the names of those that broke. An environment is removed after its run unless ``--keep``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VENVS = ROOT / ".venvs"
TABLE = HERE / "results.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from trainer_recipes.judge import HEAD, Verdict, judge, rows_of  # noqa: E402


class Trainer(NamedTuple):
    module: str
    recipes: tuple[str, ...]  # those that it runs, in the order of the table


TRAINERS = {
    "trl-1.16": Trainer("trl_recipes", ("TRL, NaPOTrainer", "TRL, a subclass")),
    "trl-0.29": Trainer("trl_recipes", ("TRL, NaPOTrainer", "TRL, a subclass")),
    "trl-0.24": Trainer("trl_recipes", ("TRL, the hook", "TRL, two negatives")),
    "llamafactory": Trainer("llamafactory_recipe", ("LLaMA-Factory", "LLaMA-Factory, two negatives")),
    "ms-swift": Trainer("swift_recipe", ("ms-swift",)),
    "torchtune": Trainer("torchtune_recipe", ("torchtune",)),
    "lightning": Trainer("lightning_recipe", ("Lightning",)),
    "accelerate": Trainer("accelerate_recipe", ("accelerate",)),
}
OLD = {"trl-0.29": ("trl",), "trl-0.24": ("trl", "transformers")}
"""Old on purpose, with ``--newest`` too: the newest TRL is in the environment called trl-1.16."""


def base(torch: str) -> Path:
    """The environment that holds torch for all, which see it by a path file: a gigabyte each without."""
    folder = VENVS / "base"
    if not (folder / ".installed").exists() or (folder / ".installed").read_text() != torch:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip(folder / "bin/python", torch, "numpy")  # first, and exactly: asked for loosely it comes with CUDA
        (folder / ".installed").write_text(torch)
    return next(folder.glob("lib/python*/site-packages"))


def environment(name: str, *, newest: bool) -> Path:
    """The interpreter of an environment for this trainer. A line with a minus is removed after all others came."""
    folder = VENVS / name
    python, stamp = folder / "bin/python", folder / ".installed"
    wanted = [line for line in (HERE / f"requirements/{name}.txt").read_text().split("\n") if line]
    if not newest and stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return python
    (torch,) = [line for line in wanted if line.startswith("torch==")]
    shared = base(torch)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    (next(folder.glob("lib/python*/site-packages")) / "shared.pth").write_text(str(shared))
    unwanted = [line.removeprefix("-") for line in wanted if line.startswith("-")]
    others = [line for line in wanted if not line.startswith("-") and line != torch]
    if newest:
        others = [line if (package := line.split("==")[0]) in OLD.get(name, ()) else package for line in others]
    pip(python, torch, *others)
    if unwanted:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
    stamp.write_text("" if newest else "\n".join(wanted))
    return python


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def run(name: str, python: Path, out: Path, limit: int = 1800) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RECIPES_OUT": str(out)}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    with (out / "log.txt").open("w") as log:
        subprocess.run(
            [python, *launch, "-m", f"trainer_recipes.{TRAINERS[name].module}"], env={**os.environ, **quiet, **paths},
            cwd=out, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=True,
        )  # fmt: skip


def tried(name: str, *, newest: bool) -> list[Verdict] | str:
    """What its recipes did, or why it is not known."""
    out = VENVS / "out" / name
    try:
        run(name, environment(name, newest=newest), out)
        return [judge(out, recipe) for recipe in TRAINERS[name].recipes]
    except (AssertionError, FileNotFoundError, subprocess.SubprocessError) as error:
        log = out / "log.txt"
        return f"{error}\n{log.read_text()[-4000:] if log.exists() else ''}"


def write_table(found: dict[str, list[Verdict]]) -> None:
    """The lines of these runs beside those of earlier ones, in the order of TRAINERS, here and on the page."""
    from benchmarks.suite import paste

    lines = rows_of(TABLE)
    lines |= {(name, v.recipe): v.line(name) for name, verdicts in found.items() for v in verdicts}
    order = [(name, recipe) for name, trainer in TRAINERS.items() for recipe in trainer.recipes]
    TABLE.write_text("\n".join([*HEAD, *(lines[key] for key in order if key in lines)]) + "\n")
    paste(ROOT / "docs/trainers.md", TABLE, TABLE.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", metavar="trainer", help=", ".join(TRAINERS))
    parser.add_argument("--newest", action="store_true", help="the newest releases, not those pinned")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args()
    if unknown := set(arguments.trainers) - set(TRAINERS):
        parser.error(f"no such trainer: {', '.join(sorted(unknown))}; there are {', '.join(TRAINERS)}")
    found, broken = {}, {}
    for name in arguments.trainers or TRAINERS:
        result = tried(name, newest=arguments.newest)
        if isinstance(result, str):
            broken[name] = result
            print(f"{name}: broken\n{result}", flush=True)
        else:
            found[name] = result
            print(*(verdict.line(name) for verdict in result), sep="\n", flush=True)
        if not arguments.keep:
            shutil.rmtree(VENVS / name, ignore_errors=True)
    if found and not arguments.newest:
        write_table(found)
    if broken:
        print(f"broken: {', '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
