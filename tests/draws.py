"""What `make test` leaves to `make test-all`: most examples of a property, most parameters of what takes long."""

from collections.abc import Container, Iterable
from typing import Any

import pytest
from hypothesis import settings


def examples(count: int, **others) -> settings:
    """Of a hundred, sixty in `make test-all` and a quarter in `make test`, as the profiles in conftest say."""
    return settings(max_examples=max(3, count * settings.default.max_examples // 100), **others)


def quick(chosen: Container, values: Iterable) -> list[Any]:
    """The parameters, of which `make test` tries the ``chosen``."""
    return [x if x in chosen else pytest.param(x, marks=pytest.mark.slow) for x in values]
