"""The price list of a budget: which formats weights may have, and what a token costs in each of them."""

from dataclasses import dataclass

from rana_kernels.allocation.cost import MULTIPLY_ADDS, BytesRead, CostModel
from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.nn.format import FLOAT, Format


@dataclass(frozen=True)
class Pricing:
    """The formats that are offered, and the unit of their costs.

    formats    of the weights
    times      the unit is the microsecond: measured times
    in_bytes   the unit is the byte that a token reads. Without both, it is the multiply-add
    """

    formats: tuple[Format, ...] = (FLOAT,)
    times: LatencyTable | None = None
    in_bytes: bool = False

    def in_format(self, format: Format, itemsize: int) -> CostModel:
        """Return the costs of weights in `format`. `itemsize` is that of the model's floats."""
        return BytesRead(format, itemsize) if self.in_bytes else self.times or MULTIPLY_ADDS
