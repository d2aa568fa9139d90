"""Raw logits of some columns, computed again in backward, to dlogits: elementwise, since the normalizer is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from napo_loss.kernels.launch import NUM_WARPS, on_device
from napo_loss.kernels.linear_logits import load_scaled, write_dlogits, write_label

BLOCK_V = 2048
CHUNK = 4 * BLOCK_V  # columns of a program


@triton.jit(
    do_not_specialize=["normalizer_stride", "first"],
    do_not_specialize_on_alignment=["bias_ptr", "targets_ptr", "normalizer_ptr", "w_ptr"],
)
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
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.program_id(1) * CHUNK
    high = tl.minimum(low + CHUNK, columns)
    row_ptr = logits_ptr + row * logits_stride
    dlogits_row_ptr = dlogits_ptr + row * dlogits_stride
    factor = tl.load(w_ptr + row) * logit_scale
    peak = tl.load(normalizer_ptr + row)
    log_total = tl.load(normalizer_ptr + normalizer_stride + row)
    target = tl.load(targets_ptr + row).to(tl.int64) - first
    mine = (target >= low) & (target < high)
    hit = load_scaled(row_ptr, bias_ptr, target, mine, logit_scale, HAS_BIAS, SCALED)
    tl.debug_barrier()  # read by all, before anyone writes
    write_dlogits(
        row_ptr, bias_ptr, dlogits_row_ptr, low, high, peak, log_total, factor, logit_scale, softcap,
        HAS_BIAS, SCALED, SOFTCAP, BLOCK_V,
    )  # fmt: skip
    write_label(dlogits_row_ptr + target, mine, hit, peak, log_total, 1.0, factor, softcap, SOFTCAP)


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
    with on_device(logits):
        linear_block_kernel[(rows, triton.cdiv(columns, CHUNK))](
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
            SCALED=logit_scale != 1,
            SOFTCAP=softcap != 0,
            CHUNK=CHUNK,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
