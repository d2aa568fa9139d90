"""Argument checks: each names the argument, what was given and what was expected, before any work is done.

Only what the host already knows is checked (types, shapes, dtypes, devices, Python numbers). A tensor's values
would cost a device sync; where they can be wrong, the result is NaN instead.
"""

from __future__ import annotations

import math
import os
from numbers import Real

import torch
from torch import Tensor


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_positive(name: str, value: object) -> None:
    """A number of Python or numpy."""
    if not (isinstance(value, Real) and 0 < float(value) < math.inf):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, shape: torch.Size) -> None:
    """``x`` lives where ``other`` does and has ``shape``."""
    check_tensor(name, x)
    check_place(name, x, other_name, other, shape)


def check_place(name: str, x: Tensor, other_name: str, other: Tensor, shape: torch.Size) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, as {other_name} asks, got {list(x.shape)}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, but {other_name} is on {other.device}")


def check_group(name: str, group: object) -> None:
    """``None``, or a process group that this process is in: PyTorch's collectives only warn and return otherwise."""
    if group is None:
        return
    import torch.distributed as dist

    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} is a process group that this process (rank {dist.get_rank()}) is not in")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_positions(name: str, x: Tensor, last: str, packed: bool) -> None:
    """``[N, T, last]``, or ``[total, last]`` where sequences are packed."""
    check_tensor(name, x)
    if x.dim() != (2 if packed else 3) or x.numel() == 0:
        axes = f"[total, {last}] tensor with cu_seqlens" if packed else f"[N, T, {last}] tensor"
        raise ValueError(f"{name} must be a non-empty {axes}, got shape {list(x.shape)}")


def check_logits(logits: Tensor, packed: bool = False) -> None:
    check_tensor("logits", logits)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    check_positions("logits", logits, "V", packed)


def check_writable(logits: Tensor) -> None:
    """Writing over an expanded tensor would write several gradients to one place."""
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"inplace_backward=True needs logits with an element of their own at every index, got an expanded tensor "
            f"of shape {list(logits.shape)} and strides {list(logits.stride())}"
        )


def check_labels(labels: Tensor, logits: Tensor, name: str = "logits") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if is_dtensor(labels):
        raise TypeError("labels must be a plain tensor, of the sequences of this rank, got a DTensor")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    expected = logits.shape[:-1]
    if labels.shape != expected:
        axes = "[N, T]" if len(expected) == 2 else "[total]"
        raise ValueError(f"labels must have shape {axes} = {list(expected)}, as {name} asks, got {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}, but {name} is on {logits.device}")


def check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    """Offsets of packed sequences. Their values are looked at where that is free, on a CPU."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {given}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but labels is on {labels.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != len(labels) or sorted(offsets) != offsets:
            raise ValueError(f"cu_seqlens must rise from 0 to total = {len(labels)}, got {offsets}")


SHARDED = (
    "{name} is {what}: its values are not all here. Call the model inside napo_loss.fused_head(model), which computes "
    "log-probs inside the model's own forward, where FSDP2 and ZeRO-3 gather the head; or gather it yourself. A head "
    "split over the vocabulary by tensor parallelism is given as a DTensor with hidden as a DTensor, or as a VocabShard"
)


def is_dtensor(x: object) -> bool:
    return hasattr(x, "full_tensor")


def check_head(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    lora_A: Tensor | None = None,  # [r, D]
    lora_B: Tensor | None = None,  # [V, r]
    *,
    shard: bool = False,
) -> None:
    """The lm_head's tensors: whole (or a ``shard`` of the vocabulary, which may be nothing), on the device of the
    hidden states, of their width and (autocast apart) dtype; both factors of LoRA or none."""
    check_tensor("hidden", hidden)
    beside = {"bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    for name, x in {"weight": weight, **{name: x for name, x in beside.items() if x is not None}}.items():
        check_tensor(name, x)
        if is_dtensor(x):
            raise TypeError(SHARDED.format(name=name, what="a DTensor"))
        if x.numel() == 0 and not shard:
            raise ValueError(SHARDED.format(name=name, what=f"empty, shape {list(x.shape)}, as a ZeRO-3 shard"))
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, but hidden is on {hidden.device}")
        if x.dtype not in LOGITS_DTYPES:  # autocast would take a float8 weight for numbers, without its scale
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, D] with hidden's D = {hidden.shape[-1]}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if lora_A is not None and lora_B is not None:
        (V, D), r = weight.shape, lora_A.shape[0] if lora_A.dim() == 2 else None
        if lora_A.shape != (r, D) or lora_B.shape != (V, r):
            raise ValueError(
                f"lora_A and lora_B must have shapes [r, D] and [V, r] beside weight {list(weight.shape)}, got "
                f"{list(lora_A.shape)} and {list(lora_B.shape)}"
            )
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype and not (autocasts(hidden) and autocasts(weight)):
        raise TypeError(
            f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; outside autocast nothing is cast, "
            "and float64 never"
        )


def autocasts(x: Tensor) -> bool:
    """Whether a linear layer would cast it: not float64; meta tensors are of a device that autocast does not know."""
    return x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def check_backend(backend: str, name: str, x: Tensor) -> None:
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'eager', got {backend!r}")
    if backend != "triton":
        return
    if x.dtype == torch.float64:
        raise TypeError(f"backend='triton' computes in float32, but {name} is float64: leave backend at 'auto'")
    if not x.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' needs a GPU, but {name} is on {x.device}: leave backend at 'auto', or set "
            "TRITON_INTERPRET=1 before triton is imported, which runs the kernels in Python to debug them"
        )


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which knows tensors on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
