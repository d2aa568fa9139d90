"""What the launcher of the objective takes, by name."""

from typing import NamedTuple


class Constants(NamedTuple):
    """Constants that the kernel shares with the eager path."""

    MIN_Q: float
    WEIGHT_FLOOR: float
    WEIGHT_PRIOR: float
    MOST_GAIN: float
    MIN_LENGTH: float
