"""How quantised weights lie in memory, and how they become float weights again.

A weight [R, N] in 8 bits is int8 [R, N]. In 4 bits it is uint8 [R, ⌈N/2⌉], two values of -8..7 a byte. Each
row is cut into groups of g columns, the last of which may be shorter. A group has one step, so the weight is
`q · scale` with a float16 scale [R, ⌈N/g⌉]. g is the smallest of 32, 64, 128 and N that gives so many groups,
so no op takes it as an argument.

In 4 bits, the columns lie in blocks of 32, which are 16 bytes. Byte i of a block holds column i in its low
four bits and column i + 16 in its high four bits. A kernel thus splits a vector of bytes into two runs of
columns with one mask and one shift. In a shorter last block, byte i holds columns 2i (low) and 2i + 1 (high).
"""

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
BLOCK = 32  # columns


def groups_of(columns: int, group: int) -> int:
    """Return how many groups of `group` columns a row has."""
    return -(-columns // max(group, 1))


def group_size(columns: int, groups: int) -> int | None:
    """Return the columns of a group in a row with so many groups, or None if no size gives that number."""
    return next((g for g in (*GROUPS, columns) if groups_of(columns, g) == groups), None)


def pack_int4(values: Tensor) -> Tensor:
    """Pack int8 values of -8..7, [R, N], two a byte: uint8 [R, ⌈N/2⌉]. For an odd N the last four bits are 0.

    Raises ValueError for another dtype or shape, or for a value out of range.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(f"pack_int4: values are {values.dtype} {list(values.shape)}, wanted int8 [R, N]")
    if values.numel() and not (values.min() >= -8 and values.max() <= 7):
        raise ValueError(f"pack_int4: values lie in {int(values.min())}..{int(values.max())}, wanted -8..7")
    rows, columns = values.shape
    whole = columns // BLOCK * BLOCK
    blocks = values[:, :whole].reshape(rows, whole // BLOCK, 2, BLOCK // 2)
    rest = torch.nn.functional.pad(values[:, whole:], (0, columns % 2))
    low = torch.cat([blocks[:, :, 0].reshape(rows, whole // 2), rest[:, 0::2]], 1)
    high = torch.cat([blocks[:, :, 1].reshape(rows, whole // 2), rest[:, 1::2]], 1)
    return (low.to(torch.int16) & 15 | (high.to(torch.int16) & 15) << 4).to(torch.uint8)


def unpack_int4(packed: Tensor, columns: int | None = None) -> Tensor:
    """Undo `pack_int4`: uint8 [R, ⌈N/2⌉] to int8 [R, N]. `columns` is N; without it, N is even."""
    columns = 2 * packed.shape[1] if columns is None else columns
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != (columns + 1) // 2:
        raise ValueError(
            f"unpack_int4: packed is {packed.dtype} {list(packed.shape)}, "
            f"wanted uint8 [R, {(columns + 1) // 2}] for {columns} columns"
        )
    rows, whole = packed.shape[0], columns // BLOCK * BLOCK
    low, high = (((packed >> shift & 15).to(torch.int8) ^ 8) - 8 for shift in (0, 4))
    blocks, half = (rows, whole // BLOCK, BLOCK // 2), whole // 2
    in_blocks = torch.stack([part[:, :half].reshape(blocks) for part in (low, high)], 2)
    rest = torch.stack([low[:, half:], high[:, half:]], 2).reshape(rows, 2 * (packed.shape[1] - half))
    return torch.cat([in_blocks.reshape(rows, whole), rest[:, : columns - whole]], 1)


def is_quantized(weight: Tensor) -> bool:
    """Say whether a weight is quantised: int8, or uint8 with two 4-bit values a byte."""
    return weight.dtype in (torch.int8, torch.uint8)


def columns_of(weight: Tensor) -> int:
    """Return N of a weight [R, N] as it is stored; in 4 bits N is even."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def dequantize(
    weight: Tensor, scale: Tensor | None, columns: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the float weight [R, N] of a quantised one; a float weight (`scale` None) is only converted.

    `columns` is N of a 4-bit weight with an odd N. The product is exact in float32.
    """
    if scale is None:
        return weight.to(dtype)
    columns = columns_of(weight) if columns is None else columns
    q = unpack_int4(weight, columns) if weight.dtype == torch.uint8 else weight
    group = group_size(columns, scale.shape[1])
    if group is None:
        raise ValueError(
            f"scale is {list(scale.shape)}, wanted one for 32, 64, 128 or all of {columns} columns"
        )
    wide = torch.promote_types(dtype, torch.float32)
    steps = scale.to(wide).repeat_interleave(group, 1)[:, :columns]
    return (q.to(wide) * steps).to(dtype)
