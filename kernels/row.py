"""How a program goes through its share of a row of logits: whole blocks without a mask, the rest around them.

A row is cut into its *body*, whole pieces of 16 bytes at 16-byte boundaries, and its *edges*, up to a piece less one
element before and after. Only the last block of a body is masked, by whole pieces: so every load and store of the body
is 16 bytes wide, and the loop over the other blocks has no branch.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp five
LARGEST_TOTAL = tl.constexpr(2.0**60)
"""Of a sum of exponentials above a base that may be too low: sums of such, and products with them, are finite."""


@triton.jit
def row_body(offset, V, ALIGN: tl.constexpr):
    """Where in a row that starts ``offset`` elements after a boundary its body starts, and how many elements it has."""
    start = tl.minimum(((-offset) & (ALIGN - 1)).to(tl.int32), V)
    return start, (V - start) // ALIGN * ALIGN


@triton.jit
def row_edges(split, start, body, V, ALIGN: tl.constexpr):
    """Entries of the vocabulary in the edges, and which of them there are for this program: ``[2·ALIGN]``."""
    e = tl.arange(0, 2 * ALIGN)
    v = tl.where(e < ALIGN, e, e - ALIGN + start + body)
    first, end = tl.where(split == 0, start, 0), tl.where(split == 0, V, 0)  # those of the first alone
    return v, ((e < ALIGN) & (e < first)) | ((e >= ALIGN) & (v < end))


@triton.jit
def body_share(split, chunk, body, ALIGN: tl.constexpr, BLOCK_V: tl.constexpr):
    """A program's share of a body: whole blocks from ``low`` to ``tail``, and a last one from there to ``high``."""
    low = tl.multiple_of(split * chunk, BLOCK_V)  # said here: of the variable of a loop it would be lost
    high = tl.multiple_of(tl.minimum(low + chunk, body), ALIGN)
    return low, low + tl.maximum(high - low - 1, 0) // BLOCK_V * BLOCK_V, high
