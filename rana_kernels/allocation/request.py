"""What is asked of a plan: how much of what to save, and how much it may store."""

from dataclasses import dataclass, field

from rana_kernels.allocation.cost import MULTIPLY_ADDS, CostModel
from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.search import Search
from rana_kernels.model.plan import AdapterSpec, Plan


@dataclass(frozen=True)
class Request:
    """Exactly one reduction, of the linears of the blocks against the same linears left dense.

    flops_reduction   share of their FLOPs to save
    time_reduction    share of their time for one token to save, counted by `latency`
    max_memory        bytes that they may store: weights, biases, thresholds and norms
    search            what a method that searches measures with
    """

    method: str
    flops_reduction: float | None = None
    time_reduction: float | None = None
    latency: LatencyTable | None = None
    max_memory: int | None = None
    search: Search | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.flops_reduction is None) == (self.time_reduction is None):
            raise ValueError(
                f"flops_reduction is {self.flops_reduction} and time_reduction {self.time_reduction}, "
                "wanted exactly one of them"
            )
        if not 0 < self.reduction < 1:
            raise ValueError(f"{self.unit} is {self.reduction}, wanted more than 0 and less than 1")
        if (self.time_reduction is None) != (self.latency is None):
            has = "given" if self.latency else None
            raise ValueError(
                f"time_reduction is {self.time_reduction} and times are {has}, wanted both or neither: "
                "measure them with rana_kernels.allocation.latency_measurement.measure_latency(model)"
            )
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"max_memory is {self.max_memory}, wanted a positive number of bytes")

    @property
    def unit(self) -> str:
        """The name of the reduction that is asked for."""
        return "flops_reduction" if self.time_reduction is None else "time_reduction"

    @property
    def reduction(self) -> float:
        asked = self.flops_reduction if self.time_reduction is None else self.time_reduction
        assert asked is not None, "one of them is given"
        return asked

    @property
    def cost_model(self) -> CostModel:
        return self.latency or MULTIPLY_ADDS

    def record(self, adapters: tuple[AdapterSpec, ...] = ()) -> Plan:
        """Return the plan that answers this request with `adapters`."""
        return Plan(adapters, self.method, self.flops_reduction, self.time_reduction, self.max_memory)
