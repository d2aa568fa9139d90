"""What the launcher of the objective takes and gives, by name."""

from typing import NamedTuple

import torch


class Constants(NamedTuple):
    """Constants that the kernel shares with the eager path."""

    Q_LOW: float
    Q_HIGH: float
    MIN_Q: float
    WEIGHT_FLOOR: float
    MIN_LENGTH: float


class Settings(NamedTuple):
    """Of each negative, in the order of the rows; ``[K]`` float32 on the device."""

    alpha: torch.Tensor
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

    means: torch.Tensor  # [2, K]: of the margin behind q, and of the reward margin
    losses: torch.Tensor  # [B]
    chosen_rewards: torch.Tensor  # [B]
    rejected_rewards: torch.Tensor  # [K, B]
    q: torch.Tensor  # [K]
    weights: torch.Tensor  # [K]
    dlogps: torch.Tensor  # [1 + K, B]: dloss_b/dlogπ of the chosen and of its negatives
