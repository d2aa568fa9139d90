"""Raw logits of some columns, computed again in backward, to dlogits: elementwise, since the normalizer is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import ELEMENTS_PER_WARP, on_device
from napo_loss.kernels.linear_logits import write_dlogits

BLOCK = 2048


@triton.jit
def linear_block_kernel(
    logits_ptr,  # [rows, columns] float32: columns `first` and on of the vocabulary
    bias_ptr,  # [columns] or unused
    targets_ptr,  # [rows]
    normalizer_ptr,  # [2, rows] float32: peak and log-total
    w_ptr,  # [rows] float32
    dlogits_ptr,  # [rows, columns]; may be the logits themselves
    logits_stride,
    dlogits_stride,
    normalizer_stride,
    columns,
    first,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64) - first
    w = tl.load(w_ptr + row)
    peak = tl.load(normalizer_ptr + row)
    log_total = tl.load(normalizer_ptr + normalizer_stride + row)
    write_dlogits(
        logits_ptr + row * logits_stride, dlogits_ptr + row * dlogits_stride, bias_ptr, tl.program_id(1) * BLOCK_V,
        columns, target, peak, log_total, w, logit_scale, softcap, HAS_BIAS, SOFTCAP, BLOCK_V,
    )  # fmt: skip


def linear_block(
    logits: torch.Tensor,  # [rows, columns] float32, those of the vocabulary from `first` on
    targets: torch.Tensor,  # [rows]
    first: int,
    normalizer: torch.Tensor,  # [2, rows] float32: peak and log-total, consecutive rows
    w: torch.Tensor,  # [rows] float32
    dlogits: torch.Tensor,  # [rows, columns]
    *,
    bias: torch.Tensor | None,  # [columns]
    logit_scale: float,
    softcap: float,
) -> None:
    """Writes ``dlogits`` with the weight ``w``; they may be ``logits``."""
    rows, columns = logits.shape
    block_v = min(BLOCK, max(16, triton.next_power_of_2(columns)))
    with on_device(logits):
        linear_block_kernel[(rows, triton.cdiv(columns, block_v))](
            logits,
            logits if bias is None else bias.contiguous(),
            targets,
            normalizer,
            w,
            dlogits,
            logits.stride(0),
            dlogits.stride(0),
            normalizer.stride(0),
            columns,
            first,
            logit_scale,
            softcap,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap != 0,
            BLOCK_V=block_v,
            num_warps=max(1, min(8, block_v // ELEMENTS_PER_WARP)),
            enable_fp_fusion=True,
        )
