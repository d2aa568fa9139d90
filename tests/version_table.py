"""The table of docs/versions.md, from the files that the sessions of noxfile.py have left in tests/tried.

python tests/version_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/versions.md"
MARKS = "<!-- sessions -->\n", "<!-- end -->\n"
COLUMNS = ("python", "torch", "triton", "numpy", "trl", "transformers", "peft")


def sessions() -> list[dict]:
    found = [json.loads(path.read_text()) for path in ROOT.glob("tests/tried/*.json")]
    return sorted(
        found, key=lambda x: [[int(n) for n in x[name].split("+")[0].split(".")] for name in ("torch", "python")]
    )


def table(found: list[dict]) -> str:
    """The versions and counts of each session, then what it left out, and why."""
    if not found:
        return "No session has been run yet.\n"
    head = ["Python", "torch", "Triton", "numpy", "TRL", "transformers", "PEFT", "passed", "failed", "skipped"]
    rows = [head, ["---"] * 7 + ["---:"] * 3]
    for x in found:
        counts = [x["passed"], len(x["failed"]), sum(x["skipped"].values())]
        rows.append([*(x[name] or "—" for name in COLUMNS), *map(str, counts)])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    for x in found:
        whys = "; ".join(f"{count} × {why}" for why, count in x["skipped"].items())
        text += f"\n- Python {x['python']}, torch {x['torch']}, {x['date']}, {x['system']}: "
        text += f"{', '.join(f'`{name}`' for name in x['files'])}" + (f". Skipped: {whys}." if whys else ".")
    return text + "\n"


def written(page: str, found: list[dict]) -> str:
    """The page with this table between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), sessions()))
