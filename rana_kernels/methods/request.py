"""What is asked of a plan: how much of what to save, and how much it may store."""

from dataclasses import dataclass

from rana_kernels.methods.prices import MULTIPLY_ADDS, Prices
from rana_kernels.plan import Adapter, Plan
from rana_kernels.times import Times

WHOLE = ("global", "rankadaptor")  # methods that see the whole model before they decide


@dataclass(frozen=True)
class Request:
    """Exactly one reduction, of the linears of the blocks against the same linears left dense.

    flops_reduction   share of their FLOPs to save
    time_reduction    share of their time for one token to save, by `times`
    max_memory        bytes that they may store: weights, biases, thresholds and scales
    """

    method: str
    flops_reduction: float | None = None
    time_reduction: float | None = None
    times: Times | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if (self.flops_reduction is None) == (self.time_reduction is None):
            raise ValueError(
                f"flops_reduction is {self.flops_reduction} and time_reduction {self.time_reduction}, "
                "wanted exactly one of them"
            )
        if not 0 < self.reduction < 1:
            raise ValueError(f"{self.unit} is {self.reduction}, wanted more than 0 and less than 1")
        if (self.time_reduction is None) != (self.times is None):
            raise ValueError(
                f"time_reduction is {self.time_reduction} and times are {'given' if self.times else None}, "
                "wanted both or neither: measure them with rana_kernels.times.measure_times(model)"
            )
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"max_memory is {self.max_memory}, wanted a positive number of bytes")
        if self.method not in WHOLE and (self.times or self.max_memory):
            raise ValueError(
                f"method {self.method!r} counts FLOPs and stores what they pay for: time_reduction and "
                f"max_memory want method {' or '.join(map(repr, WHOLE))}"
            )

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
    def prices(self) -> Prices:
        return self.times or MULTIPLY_ADDS

    def record(self, adapters: tuple[Adapter, ...] = ()) -> Plan:
        """The plan that answers it."""
        return Plan(adapters, self.method, self.flops_reduction, self.time_reduction, self.max_memory)
