"""What a caller of the objective can get wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_loss.backend import upcast
from napo_loss.checks import check_like, check_place, check_positive, check_tensor


def checked_beta(beta: object) -> float | Tensor:
    """β as a float, or as the 0-d tensor that it is. Of one on a GPU, where looking would cost a sync, a wrong value
    is NaN."""
    if not isinstance(beta, Tensor):
        check_positive("beta", beta)
        return float(beta)  # pyright: ignore[reportArgumentType]
    if beta.dim() > 0:
        raise ValueError(f"beta must be a number or a 0-d tensor, got shape {list(beta.shape)}")
    if beta.device.type == "cpu" and not torch.compiler.is_compiling():
        check_positive("beta", beta.item())
        return beta
    return torch.where((beta > 0) & (beta < torch.inf), beta, torch.nan)


def check_length(name: str, x: object, logps: Tensor) -> None:
    """A length of each sequence: counted, or a sum of token weights."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be numbers, got {x.dtype}")
    check_place(name, x, "its sum", logps, logps.shape)


def check_logps(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    may_be_empty: bool = False,
) -> None:
    """``[B]`` chosen, ``[B]`` or ``[K, B]`` rejected, and references of the same shapes or none at all."""
    check_tensor("policy_chosen_logps", policy_chosen)
    if policy_chosen.dim() != 1:
        raise ValueError(f"policy_chosen_logps must have shape [B], got {list(policy_chosen.shape)}")
    if policy_chosen.numel() == 0 and not may_be_empty:
        raise ValueError(
            "policy_chosen_logps is empty: the batch holds no pair, which only a rank of a process_group may do"
        )
    check_tensor("policy_rejected_logps", policy_rejected)
    shape = policy_rejected.shape
    if len(shape) not in (1, 2) or shape[-1] != policy_chosen.shape[0] or shape[:-1].numel() == 0:
        raise ValueError(
            f"policy_rejected_logps must have shape [B] or [K, B] with B = {policy_chosen.shape[0]} and K >= 1, "
            f"got {list(shape)}"
        )
    check_like("policy_rejected_logps", policy_rejected, "policy_chosen_logps", policy_chosen, shape)
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError(
            "reference_chosen_logps and reference_rejected_logps must both be given, or both be None (reference-free)"
        )
    if reference_chosen is not None and reference_rejected is not None:
        check_like(
            "reference_chosen_logps",
            reference_chosen,
            "policy_chosen_logps",
            policy_chosen,
            policy_chosen.shape,
        )
        check_like("reference_rejected_logps", reference_rejected, "policy_rejected_logps", policy_rejected, shape)


def check_pair_mask(name: str, mask: object, logps_name: str, logps: Tensor, *shapes: torch.Size) -> None:
    """Which pairs count, beside the log-probs or margins that it masks; of their shape, or one of ``shapes``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True for pairs that count, got {given}")
    if mask.shape not in (logps.shape, *shapes):
        expected = " or ".join(dict.fromkeys(str(list(shape)) for shape in (logps.shape, *shapes)))
        raise ValueError(f"{name} must have shape {expected}, as {logps_name} asks, got {list(mask.shape)}")
    if mask.device != logps.device:
        raise ValueError(f"{name} is on {mask.device}, but {logps_name} is on {logps.device}")


def check_margin(margin: Tensor, *, may_be_empty: bool = False) -> None:
    check_tensor("margin", margin)
    no_rows, no_pairs = margin.shape[:-1].numel() == 0, margin.numel() == 0 and not may_be_empty
    if margin.dim() not in (1, 2) or no_rows or no_pairs:
        raise ValueError(f"margin must be a non-empty [B] or [K, B] tensor, got shape {list(margin.shape)}")


def check_q(q: float | Tensor, margin: Tensor) -> None:
    """A float in [0, 1], or a tensor that broadcasts to the margin without growing it."""
    if not isinstance(q, Tensor):
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        return
    check_tensor("q", q)
    try:
        fits = torch.broadcast_shapes(q.shape, margin.shape) == margin.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"q must broadcast to the margin's shape {list(margin.shape)}, got {list(q.shape)}")
    if q.dim() and q.device != margin.device:
        raise ValueError(f"q is on {q.device}, but the log-probs are on {margin.device}")


Q_FROM = ("rank_means", "all_pairs", "each_pair")


def check_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not 0 <= low <= high <= 1:
        raise ValueError(f"bounds must satisfy 0 <= low <= high <= 1, got {bounds}")


def check_mean(q_from: str, decay: float, where: str = "") -> None:
    """``where``: what the two are settings of, with a dot."""
    if q_from not in Q_FROM:
        raise ValueError(f"{where}q_from must be one of {Q_FROM}, got {q_from!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"{where}decay must be in [0, 1), got {decay}")


def checked_previous(name: str, previous: object, shape: torch.Size) -> Tensor:
    """The moments of the step before, of as many negatives: one tensor, whether they came so or as two."""
    if isinstance(previous, tuple):
        for x in previous:
            check_tensor(name, x)
        previous = torch.stack([upcast(x) for x in previous])
    if not isinstance(previous, Tensor):
        raise TypeError(f"{name} must be the moments of the step before, got {type(previous).__name__}")
    if previous.shape != shape:
        raise ValueError(
            f"{name} must be the moments of the step before, {list(shape)}, got shape {list(previous.shape)}"
        )
    return previous.detach()
