"""Weights as the decode kernels read them: floats, int8, or two 4-bit values a byte.

A kernel loads the elements of a tile once, as they are stored, each thread 16 bytes at a time (a vector),
and makes floats of them in registers. A byte of 4-bit values holds two columns: `floats` returns those in
one half of the bits, the low or the high one, and `columns` says which columns they are. Loops therefore run
over the halves of an element; floats and int8 have only one. A group has 32 columns or more, so the columns
of a vector share a scale.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.ops import quantized

# For more tokens, quantised weights become float weights first, because products then read them many times.
MOST_TOKENS = 16
# Stands for the number of columns where a row is one group. Every column is in the first group of that size.
_WHOLE_ROW = 1 << 30
# For several tokens, quantised weights are multiplied in runs of so many columns, which share a scale.
RUN = tl.constexpr(32)


class Weight(NamedTuple):
    """A weight [R, N], as a kernel receives it.

    stored        the elements; their dtype says which kind they are
    stride        elements from one row to the next
    width         elements of a row
    scale         the float16 steps of the groups, [R, groups], or None for floats
    scale_stride  steps from one row to the next
    group         columns of a group
    vector        elements in 16 bytes
    halves        columns in an element: 1 or 2
    in_blocks     whether all columns lie in whole blocks of 32, so that no block is in plain order
    """

    stored: Tensor
    stride: int
    width: int
    scale: Tensor | None
    scale_stride: int
    group: tl.constexpr
    vector: tl.constexpr
    halves: tl.constexpr
    in_blocks: tl.constexpr

    @property
    def bits(self) -> int:
        """Return how many bits a column has."""
        return 8 * self.stored.itemsize // self.halves.value


def readable(stored: Tensor, scale: Tensor | None, columns: int, M: int, dtype: torch.dtype) -> Weight:
    """Return a weight [R, columns] as the kernels for M tokens of this dtype read it."""
    if scale is None or M > MOST_TOKENS:
        stored, scale = quantized.dequantize(stored, scale, columns, dtype), None
    group = None if scale is None else quantized.group_size(columns, scale.shape[1])
    return Weight(
        stored,
        stored.stride(0),
        stored.shape[1],
        scale,
        0 if scale is None else scale.stride(0),
        tl.constexpr(group if group in quantized.GROUPS else _WHOLE_ROW),
        tl.constexpr(16 // stored.itemsize),
        tl.constexpr(2 if stored.dtype == torch.uint8 else 1),
        tl.constexpr(columns % quantized.BLOCK == 0),
    )


def stored_of(*weights: Weight | None) -> list[Tensor | None]:
    """Return the elements of optional weights."""
    return [None if weight is None else weight.stored for weight in weights]


@triton.jit
def elements(weight, row, wanted, first, BLOCK: tl.constexpr):
    """Load the elements of BLOCK columns, from column `first` on, of the wanted ones of these rows.

    Each is read once, so it may leave the cache first.
    """
    e = first // weight.halves + tl.arange(0, BLOCK // weight.halves)
    return tl.load(
        weight.stored + row[:, None].to(tl.int64) * weight.stride + e[None, :],
        mask=wanted[:, None] & (e < weight.width)[None, :],
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit
def columns(weight, first, N, half: tl.constexpr, BLOCK: tl.constexpr):
    """Return the columns in one half of the elements of a tile, [vectors, elements of a vector].

    Those from N on do not exist.
    """
    COVERED: tl.constexpr = weight.vector * weight.halves
    start = first + tl.arange(0, BLOCK // COVERED)[:, None] * COVERED
    i = tl.arange(0, weight.vector)[None, :]
    in_block = start + weight.vector * half + i
    if weight.in_blocks or weight.halves == 1:
        return in_block
    return tl.where(start + COVERED <= N, in_block, start + 2 * i + half)


@triton.jit
def steps(weight, row, wanted, first, N, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Load the scales of a tile in float32, [BLOCK / WIDTH, rows]: one for every WIDTH columns.

    The rows come last, because Triton then gives neighbouring columns to neighbouring threads, as it does for
    the elements. A thread thus loads the scales of its own vectors, and no scale moves between threads.
    """
    run = first + tl.arange(0, BLOCK // WIDTH) * WIDTH
    scale = tl.load(
        weight.scale + row[None, :].to(tl.int64) * weight.scale_stride + (run // weight.group)[:, None],
        mask=wanted[None, :] & (run < N)[:, None],
        other=0,
    )
    return scale.to(tl.float32)


@triton.jit
def floats(e, half: tl.constexpr):
    """Return one half of elements in float32.

    With the sign bit reversed, the bits of q are q + 8 or q + 128. As the last bits of the float 2^23 they
    add this to it, and a subtraction leaves q. Instructions that convert integers are slower.
    """
    if e.dtype == tl.int8:
        bits = e.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    if e.dtype == tl.uint8:
        bits = e.to(tl.uint32) ^ 0x4B000088
        if half == 0:
            return (bits & 0xFF00000F).to(tl.float32, bitcast=True) - 8388616.0
        return (bits & 0xFF0000F0).to(tl.float32, bitcast=True) * 0.0625 - 524296.0
    return e.to(tl.float32)


@triton.jit
def by_runs(w, RUNS: tl.constexpr):
    """Return a tile of weights as one matrix for each run of columns."""
    return tl.permute(tl.reshape(w, [w.shape[0], RUNS, w.shape[1] // RUNS]), [1, 0, 2])
