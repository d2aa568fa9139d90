"""What the launcher of the objective takes and gives, by name."""

from typing import NamedTuple

import torch


class Constants(NamedTuple):
    """Constants that the kernel shares with the eager path."""

    MIN_Q: float
    WEIGHT_FLOOR: float
    WEIGHT_PRIOR: float
    MOST_GAIN: float
    MIN_LENGTH: float


class Settings(NamedTuple):
    """Of each negative, in the order of the rows; ``[K]`` float32 on the device."""

    slope: torch.Tensor  # NaN for the moment estimator, which has none
    top: torch.Tensor  # q at a margin of -inf
    low: torch.Tensor  # the smallest q
    reads_mean: torch.Tensor  # 0 or 1: whether q is read from per-token means
    fixed_q: torch.Tensor  # NaN where q is estimated
    weight: torch.Tensor


class Switches(NamedTuple):
    """What the kernel is compiled for."""

    AVERAGE: bool  # the loss reads per-token means
    DYNAMIC: bool  # weights are shares of the mean reward margins
    COMPUTE_LOSS: bool  # False: the means alone, which other ranks wait for


class Outputs(NamedTuple):
    """Float32."""

    means: torch.Tensor  # [3, K]: of the margin behind q, of its square, and of the margin that the loss reads
    losses: torch.Tensor  # [B]
    chosen_rewards: torch.Tensor  # [B]
    rejected_rewards: torch.Tensor  # [K, B]
    q: torch.Tensor  # [K]
    weights: torch.Tensor  # [K]
    moments: torch.Tensor  # [2, K]: the first two means, smoothed
    dlogps: torch.Tensor  # [1 + K, B]: dloss_b/dlogπ of the chosen and of its negatives
