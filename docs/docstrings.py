"""What the API page reads differently from Python: cross-references, and the example of a docstring.

Docstrings refer to each other as Sphinx does, ``:func:`noise_level` ``, which Python's ``help`` leaves readable; the
page makes links of them. Their one ``Example:`` is a doctest, which Google style calls ``Examples:``. What is returned
is described in a sentence, whose first colon would be taken for the end of a type.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|data|meth):`([\w.]+)`")
EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
RETURNS = re.compile(r"^( *(?:Returns|Yields):\n.*?): ", re.MULTILINE)
ROOMS = {
    "napo_loss.trl": ("NaPOConfig", "NaPOTrainer"),
    "napo_loss.bias": (
        "BiasSettings",
        "add_biased_negatives",
        "natural_noise",
        "read_released",
        "token_f1",
        "write_released",
    ),
}


def link(match: re.Match) -> str:
    name = match[1].rpartition(".")[2]
    room = next((room for room, names in ROOMS.items() if name in names), "napo_loss")
    return f'<autoref identifier="{room}.{name}" optional><code>{name}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites every docstring once, when its object is found."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = RETURNS.sub(r"\1&#58; ", ROLE.sub(link, obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
