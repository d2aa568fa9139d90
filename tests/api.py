"""The public names and what they take, as text. What is kept in api.txt is what users may have written down.

python tests/api.py > tests/api.txt
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

PACKAGES = ("napo_loss", "napo_loss.bias", "napo_loss.trl")
KEPT = Path(__file__).with_suffix(".txt")


def lines(package: str) -> list[str]:
    """Of every public name its kind, its parameters, and of a class its public methods, attributes and own fields."""
    module = importlib.import_module(package)
    found = []
    for name in sorted(module.__all__):
        thing = getattr(module, name)
        full = f"{package}.{name}"
        if inspect.isclass(thing):
            found += [f"class {full}", *(f"  {line}" for line in members(thing))]
        elif inspect.isroutine(thing):
            found.append(f"def {full}{signature(thing)}")
        else:
            found.append(f"{full}: {type(thing).__name__}")
    return found


def members(cls: type) -> list[str]:
    """What the class itself and its bases in this package define, in order: an enormous base is its own affair."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("napo_loss")]
    defaults = {f.name: f.default for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    defaults |= getattr(cls, "_field_defaults", {})
    found: dict[str, str] = {}
    for base in ours:
        for name, annotation in inspect.get_annotations(base).items():
            if not name.startswith("_") and "ClassVar" not in str(annotation):
                default = defaults.get(name, dataclasses.MISSING)
                found[name] = f"{name}: {text(annotation)}" + (
                    "" if default is dataclasses.MISSING else f" = {default!r}"
                )
        for name, member in vars(base).items():
            plain = inspect.unwrap(getattr(member, "__func__", member))
            if name.startswith("_") and (name != "__init__" or dataclasses.is_dataclass(cls)):
                continue
            if isinstance(member, property):
                found[name] = f"{name}: property"
            elif inspect.isfunction(plain):
                found[name] = f"{name}{signature(plain)}"
    return list(found.values())


def signature(function: Any) -> str:
    """On one line, annotations as they are written."""
    parts, found = [], inspect.signature(function)
    star = False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        annotation = "" if p.annotation is p.empty else f": {text(p.annotation)}"
        parts.append(f"{mark}{p.name}{annotation}" + ("" if p.default is p.empty else f" = {p.default!r}"))
    returns = "" if found.return_annotation is found.empty else f" -> {text(found.return_annotation)}"
    return f"({', '.join(parts)}){returns}"


def text(annotation: Any) -> str:
    if isinstance(annotation, typing.ForwardRef):  # what a NamedTuple makes of a string
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


if __name__ == "__main__":
    sys.path.insert(0, str(KEPT.parent.parent))  # the checkout's
    print("\n".join(line for package in PACKAGES for line in lines(package)))
