"""How many examples a property is tried on."""

from hypothesis import settings


def examples(count: int, **others) -> settings:
    """All in `make test-all`, a quarter of them in `make test`: the profile, one of two in conftest, says so."""
    return settings(max_examples=max(3, count * settings.default.max_examples // 100), **others)
