"""What docs/trainers.md says: the code of its sections, which the recipes are run from."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/trainers.md"


def section(heading: str) -> str:
    """From this heading to the next of its level or above."""
    text = PAGE.read_text()
    (found,) = re.finditer(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def code(heading: str, number: int = 0, languages: str = "python|py") -> str:
    """One block of a section."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", section(heading), re.DOTALL | re.MULTILINE)[number]


def names(*blocks: str, **given) -> dict:
    """What is defined after these blocks ran one after the other, in a namespace with these names."""
    namespace = dict(given)
    for block in blocks:
        exec(compile(block, "a block of docs/trainers.md", "exec"), namespace)
    return namespace
