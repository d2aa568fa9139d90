"""Errors at every line of the package: what an interrupt, or memory that ends, may do between any two of them."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import napo_loss

PACKAGE = Path(napo_loss.__file__).parent


class Interrupt:
    """Inside, raises ``error`` at the ``at``-th line of the package that runs, backward's too; keeps them in ``seen``.

    Not at lines of a ``finally``: no Python code can put something back where putting it back is interrupted.
    """

    def __init__(self, at: int = 0, error: type[BaseException] = KeyboardInterrupt):
        self.at, self.error = at, error
        self.seen: list[tuple[str, int]] = []

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: Any, event: str, arg: Any) -> Callable | None:
        name = frame.f_code.co_filename
        return self._line if Path(name).is_relative_to(PACKAGE) and "kernels" not in name else None

    def _line(self, frame: Any, event: str, arg: Any) -> Callable:
        if event == "line" and frame.f_lineno not in cleanups(frame.f_code.co_filename):
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) == self.at:
                raise self.error(f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self._line


@lru_cache
def cleanups(path: str) -> frozenset[int]:
    """The lines of all ``finally`` in a file."""
    tries = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Try)]
    return frozenset(
        line for node in tries for x in node.finalbody for line in range(x.lineno, (x.end_lineno or x.lineno) + 1)
    )


def places(step: Callable[[], Any], count: int | None) -> list[int]:
    """Where each line that a step runs is met first; or ``count`` of these places, evenly."""
    with Interrupt() as all_lines:
        step()
    first = sorted({line: -at for at, line in reversed([*enumerate(all_lines.seen, 1)])}.values(), reverse=True)
    assert len(first) > 20
    return [-at for at in first[:: 1 if count is None else len(first) // count]]


def global_state(model: nn.Module | None = None) -> dict[str, Any]:
    """What a function might change for everybody else, and leave so: of PyTorch, of Python, of a model's hooks."""
    matmul = torch.backends.cuda.matmul
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._is_torch_function_mode_enabled()),
        "bf16 sums": matmul.allow_bf16_reduced_precision_reduction,
        "fp16 sums": matmul.allow_fp16_reduced_precision_reduction,
        "warnings": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
        "hooks": hooks(model) if model is not None else None,
    }


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


def assert_equal(found: list[Tensor], expected: list[Tensor], where: object) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), where
