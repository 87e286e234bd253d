"""The part of one adapter that a process of vLLM computes: its shares, and the shapes of its tensors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.format import Format

ROWS = ("rows", "rows_scale")


@dataclass(frozen=True)
class Share:
    """The `size` entries from `start` on, of the `total` entries in the checkpoint."""

    start: int
    size: int
    total: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this share of `tensor` along `dim`."""
        return tensor.narrow(dim, self.start, self.size)


class Held(NamedTuple):
    """A tensor that a process holds. dtype None: floats in the dtype of its layer, or of its name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def _matrix(name: str, rows: int, columns: int, format: Format) -> dict[str, Held]:
    """Return a weight, and its scale if it is quantised."""
    if not format.quantized:
        return {name: Held((rows, columns))}
    weight, scale = format.empty(rows, columns, "meta")
    return {name: Held(tuple(weight.shape), weight.dtype), f"{name}_scale": Held(tuple(scale.shape))}


def _vector(name: str, size: int) -> dict[str, Held]:
    return {name: Held((size,))}


@dataclass(frozen=True)
class Piece:
    """The part of one adapter that this process computes.

    inputs    its share of the K inputs
    ranks     its share of the R ranks; R is 0 unless this is a rank adapter
    columns   its share of the columns, for each output of the layer that the adapter computes
    first     the number of the first of these outputs
    """

    adapter: AdapterSpec
    inputs: Share
    ranks: Share
    columns: tuple[Share, ...]
    first: int

    @property
    def width(self) -> int:
        return sum(column.size for column in self.columns)

    @property
    def outputs(self) -> range:
        """The numbers of the layer's outputs that the adapter computes."""
        return range(self.first, self.first + len(self.columns))

    @property
    def scattered(self) -> bool:
        """Whether its rank values are summed over the processes, and its ranks divided among them."""
        return self.adapter.kind == "rank" and self.inputs.size < self.inputs.total

    @property
    def masked(self) -> Share:
        """Its share of what the mask selects: ranks or neurons."""
        return self.ranks if self.adapter.kind == "rank" else self.inputs

    @property
    def held(self) -> dict[str, Held]:
        """The shapes and dtypes of the tensors that this process holds."""
        return self._tensors(self.inputs.size, self.width, self.masked.size)

    def held_of(self, output: int) -> dict[str, Held]:
        """What this process would hold if the adapter computed one output alone."""
        return self._tensors(self.inputs.size, self.columns[output - self.first].size, self.masked.size)

    def stored(self, name: str, output: int) -> list[tuple[int, ...]]:
        """Return the shapes that tensor `name` of output number `output` may have in the checkpoint.

        The rows of a joint RanaMLP, of ranks or neurons, are stored once for each output. All other tensors
        are stored once for all outputs of the adapter.
        """
        K, rows, total = self.inputs.total, self.masked.total, sum(column.total for column in self.columns)
        widths = [total]
        if name in ROWS:
            widths.append(self.columns[output - self.first].total)
        found = (self._tensors(K, width, rows).get(name) for width in widths)
        return [held.shape for held in found if held is not None]

    def _tensors(self, K: int, N: int, rows: int) -> dict[str, Held]:
        adapter = self.adapter
        if adapter.kind == "dense":
            return _matrix("qweight" if adapter.format.quantized else "weight", N, K, adapter.format)
        of_rows = _matrix("rows", rows, N, adapter.rows_format(N))
        if adapter.kind == "neuron":
            return {**of_rows, **_vector("threshold", rows), **_vector("norms", rows)}
        return {**_matrix("B", self.ranks.total, K, adapter.format), **of_rows, **_vector("threshold", rows)}

    def fill(self, name: str, mine: Tensor, stored: Tensor, output: int) -> int:
        """Copy this process's part of a stored tensor into `mine`, and return the number of elements."""
        if self.adapter.format.quantized:
            part = stored  # of one process
        elif name == "B":
            part = self.inputs.of(stored, 1)
        elif name in ("threshold", "norms"):
            part = self.masked.of(stored, 0)
        elif name == "weight":
            part = self._columns(self.inputs.of(stored, 1), 0)
        elif stored.shape == self.stored(name, output)[0]:
            part = self._columns(self.masked.of(stored, 0), 1)
        else:
            part = self.columns[output - self.first].of(self.masked.of(stored, 0), 1)
        if part.shape != mine.shape:  # the rows of one output
            first = sum(column.size for column in self.columns[: output - self.first])
            mine = mine.narrow(1, first, part.shape[1])
        mine.copy_(part)
        return mine.numel()

    def _columns(self, tensor: Tensor, dim: int) -> Tensor:
        blocks = tensor.split([column.total for column in self.columns], dim)
        return torch.cat([c.of(block, dim) for c, block in zip(self.columns, blocks, strict=True)], dim)
