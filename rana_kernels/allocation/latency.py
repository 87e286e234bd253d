"""How long a machine's kernels take for one token: a table by shape, lines through it, and its file.

`stopwatch.py` measures it. Between the points that were measured, and beyond them, time is a line in the
stored and in the live rows: so many microseconds a call, and so many for each row that is read.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rana_kernels.allocation.cost import LinearCost
from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import linear_of
from rana_kernels.system.files import write_json

FORMAT = 1
SMALLEST = 1e-6  # µs of a live row: where calls hide what it takes


@dataclass(frozen=True)
class ShapeLatency:
    """Microseconds of linears K → N for one token.

    dense     left as they are
    ranks     rank adapters: (stored rows, live rows, µs) of each that was measured
    neurons   neuron adapters: (stored rows, live rows, µs)
    """

    in_features: int
    width: int
    dense: float
    ranks: tuple[tuple[float, float, float], ...]
    neurons: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        where = f"times of {self.in_features} -> {self.width}"
        points = (*self.ranks, *self.neurons)
        values = [self.in_features, self.width, self.dense, *(value for point in points for value in point)]
        if not self.ranks or not self.neurons or any(len(point) != 3 for point in points):
            raise ValueError(f"{where} have {points}, wanted (stored rows, live rows, µs) of both kinds")
        if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
            raise ValueError(f"{where} have {values}, wanted positive numbers")


@dataclass(frozen=True)
class LatencyTable:
    """Prices in microseconds (`methods/prices.py`), for the shapes that were measured.

    machine   where: processor or card, threads, dtype of the weights, versions
    """

    machine: dict[str, Any]
    shapes: tuple[ShapeLatency, ...]

    def dense(self, in_features: int, width: int) -> float:
        return self._of(in_features, width).dense

    def rank(self, in_features: int, width: int) -> LinearCost:
        return fit_cost(self._of(in_features, width).ranks)

    def neuron(self, in_features: int, width: int) -> LinearCost:
        return fit_cost(self._of(in_features, width).neurons)

    def save(self, path: str | os.PathLike) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(path: str | os.PathLike) -> "LatencyTable":
        """What `save` wrote. ValueError for anything else."""
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, wanted {FORMAT}")
            return LatencyTable(dict(data["machine"]), tuple(_read(entry) for entry in data["shapes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no table of times ({error}): delete it, and measure again") from None

    def require(self, model: nn.Module, blocks: list[Block]) -> None:
        """Raise ValueError unless these are times of linears like those of `model`'s blocks."""
        weight = linear_of(model, blocks[0].linears[0]).weight
        dtype = str(weight.dtype).removeprefix("torch.")
        if self.machine.get("dtype") != dtype:
            has = self.machine.get("dtype")
            raise ValueError(f"the times are of {has}, the model is {dtype}: measure them again")
        for size in sizes_of(model, blocks):
            self._of(*size)

    @cached_property
    def _by_size(self) -> dict[tuple[int, int], ShapeLatency]:
        return {(shape.in_features, shape.width): shape for shape in self.shapes}

    def _of(self, in_features: int, width: int) -> ShapeLatency:
        if (in_features, width) not in self._by_size:
            raise ValueError(
                f"the times have no linear {in_features} -> {width}: measure them with this model, or one of "
                "its shape"
            )
        return self._by_size[in_features, width]


def _read(entry: dict[str, Any]) -> ShapeLatency:
    ranks, neurons = (tuple(tuple(point) for point in entry[kind]) for kind in ("ranks", "neurons"))
    return ShapeLatency(entry["in_features"], entry["width"], entry["dense"], ranks, neurons)


def sizes_of(model: nn.Module, blocks: list[Block]) -> list[tuple[int, int]]:
    """K and N of every linear of the blocks, and of those that may share their ranks together."""
    sizes = set()
    for block in blocks:
        for names in block.inputs.values():
            linears = [linear_of(model, name) for name in names]
            K, widths = linears[0].in_features, [linear.out_features for linear in linears]
            sizes |= {(K, N) for N in (*widths, sum(widths))}
    return sorted(sizes)


@lru_cache
def fit_cost(points: tuple[tuple[float, float, float], ...]) -> LinearCost:
    """Of least relative error, through (stored rows, live rows, µs); no row and no call takes less than no
    time. Of neuron adapters all rows are stored, and cost what a call does."""
    table = torch.tensor(points, dtype=torch.float64)
    columns = torch.cat([torch.ones(len(table), 1, dtype=torch.float64), table[:, :2]], 1)
    microseconds, found = table[:, 2:], torch.zeros(3, dtype=torch.float64)
    used = [0, 1, 2] if len(table[:, 0].unique()) > 1 else [0, 2]
    while used:
        scaled = columns[:, used] / microseconds
        found[used] = torch.linalg.lstsq(scaled, torch.ones_like(microseconds)).solution[:, 0]
        if (found >= 0).all():
            break
        used = [i for i in used if i != int(found.argmin())]
        found.zero_()
    fixed, stored, live = found.tolist()
    return LinearCost(fixed, stored, max(live, SMALLEST))
