"""The format of a stored weight: floats, or whole numbers of 8 or 4 bits with a step for each group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.ops.quantized import BLOCK, GROUPS, group_size, groups_of

WIDTHS = (16, 8, 4)


@dataclass(frozen=True)
class Format:
    """How a weight [R, N] is stored (`rana_kernels.ops.quantized`).

    bits    16: floats in the dtype of the model, float32 too · 8: int8 · 4: two values a byte
    group   columns that share a float16 step: 32, 64, 128, or None for a whole row. None with 16 bits
    """

    bits: int = 16
    group: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise ValueError(f"bits is {self.bits!r}, wanted 16, 8 or 4")
        fits = self.group is None or (self.bits < 16 and type(self.group) is int and self.group in GROUPS)
        if not fits:
            wanted = "None with 16 bits" if self.bits == 16 else "32, 64, 128, or None for a whole row"
            raise ValueError(f"group is {self.group!r}, wanted {wanted}")

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def for_rows(self, columns: int) -> "Format":
        """Return the format of `rows` with so many columns: an odd number of them is not stored in 4 bits."""
        return Format(8, self.group) if self.bits == 4 and columns % 2 else self

    @property
    def border(self) -> int:
        """The columns before and after each multiple of this number are weights of this format themselves."""
        return max(self.group or 1, BLOCK if self.bits == 4 else 1)

    @property
    def for_ranks(self) -> "Format":
        """Return the format of `rows` of a rank adapter: 8 bits where B has 4.

        Ranks are not correlated, so no row can make good the error of another (docs/quantization.md).
        """
        return Format(8, self.group) if self.bits == 4 else self

    def splits_at(self, column: int) -> bool:
        """Say whether the columns before and after `column` are weights of this format themselves."""
        return column % self.border == 0

    def empty(self, rows: int, columns: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Return an empty quantised weight and its scale."""
        dtype, stored = (torch.int8, columns) if self.bits == 8 else (torch.uint8, (columns + 1) // 2)
        groups = self._groups(columns)
        return (
            torch.empty(rows, stored, dtype=dtype, device=device),
            torch.empty(rows, groups, dtype=torch.float16, device=device),
        )

    def row_bytes(self, columns: int, itemsize: int) -> int:
        """Return the bytes of one row with its steps. `itemsize` is that of the model's floats."""
        if not self.quantized:
            return itemsize * columns
        return (columns * self.bits + 7) // 8 + 2 * self._groups(columns)

    def _groups(self, columns: int) -> int:
        return groups_of(columns, columns if self.group is None else self.group)


FLOAT = Format()


def format_of(weight: Tensor, scale: Tensor | None, columns: int) -> Format:
    """Return the format of a weight with so many columns. The shape of its scale tells the group.

    One step a row is a group of None, whatever the group that it was rounded with.
    """
    if weight.is_floating_point():
        return FLOAT
    group = None
    if scale is not None and scale.dim() == 2 and scale.shape[1] > 1:
        group = group_size(columns, scale.shape[1])
    return Format(4 if weight.dtype == torch.uint8 else 8, group if group in GROUPS else None)
