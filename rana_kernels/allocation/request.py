"""The request for a plan: a reduction of FLOPs or of time, and the bytes that the plan may store."""

from dataclasses import dataclass, field

from torch import nn

from rana_kernels.allocation.cost import MULTIPLY_ADDS, CostModel
from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.search import Search
from rana_kernels.model.install import output_head
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.format import FLOAT, Format


@dataclass(frozen=True)
class Request:
    """A budget for the linears of the blocks, with exactly one reduction.

    flops_reduction   the fraction to save of the FLOPs of these linears
    time_reduction    the fraction to save of the time that these linears take for one token
    latency           the measured times, if there is a `time_reduction`
    max_memory        the bytes that these linears may store: weights, biases, thresholds and norms
    search            the settings of the search, for a method that searches
    format            of the weights of these linears
    lm_head_format    of the weight of lm_head
    """

    method: str
    flops_reduction: float | None = None
    time_reduction: float | None = None
    times: LatencyTable | None = None
    max_memory: int | None = None
    search: Search | None = field(default=None, repr=False)
    format: Format = FLOAT
    lm_head_format: Format = FLOAT

    def __post_init__(self) -> None:
        if (self.flops_reduction is None) == (self.time_reduction is None):
            raise ValueError(
                f"flops_reduction is {self.flops_reduction} and time_reduction {self.time_reduction}, "
                "wanted exactly one of them"
            )
        if not 0 < self.reduction < 1:
            raise ValueError(f"{self.unit} is {self.reduction}, wanted more than 0 and less than 1")
        if (self.time_reduction is None) != (self.times is None):
            has = "given" if self.times else None
            raise ValueError(
                f"time_reduction is {self.time_reduction} and times are {has}, wanted both or neither: "
                "measure them with rana_kernels.allocation.latency_measurement.measure_latency(model)"
            )
        if self.times is not None and self.format.quantized:
            raise ValueError(
                f"bits is {self.format.bits} and times are given, wanted flops_reduction: the times are of "
                "weights in 16 bits"
            )
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"max_memory is {self.max_memory}, wanted a positive number of bytes")

    @property
    def unit(self) -> str:
        """The name of the reduction that was given."""
        return "flops_reduction" if self.time_reduction is None else "time_reduction"

    @property
    def reduction(self) -> float:
        asked = self.flops_reduction if self.time_reduction is None else self.time_reduction
        assert asked is not None, "one of them is given"
        return asked

    @property
    def cost_model(self) -> CostModel:
        return self.times or MULTIPLY_ADDS

    def record(self, adapters: tuple[AdapterSpec, ...] = ()) -> Plan:
        """Return the plan that answers this request with `adapters`."""
        return Plan(
            adapters, self.method, self.flops_reduction, self.time_reduction, self.max_memory,
            lm_head_bits=self.lm_head_format.bits, lm_head_group=self.lm_head_format.group,
        )  # fmt: skip


def formats(
    model: nn.Module, bits: int, group: int | None, lm_head_bits: int | None
) -> tuple[Format, Format]:
    """Return the formats of the linears and of lm_head.

    bits, group    of the linears; `group` does not matter with 16 bits
    lm_head_bits   None: as many as the linears have, if the model has an lm_head

    Raises ValueError for numbers that are no format.
    """
    if lm_head_bits is None:
        lm_head_bits = bits if isinstance(output_head(model), nn.Linear) else 16
    own, head = (Format(width, None if width == 16 else group) for width in (bits, lm_head_bits))
    return own, head
