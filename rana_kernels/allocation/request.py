"""The request for a plan: a reduction of FLOPs, time or bytes, the bits of weights, and a cap on memory."""

from dataclasses import dataclass, field

from torch import nn

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.allocation.pricing import Pricing
from rana_kernels.allocation.search import Search
from rana_kernels.model.head import head_block, require_head
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.format import FLOAT, WIDTHS, Format

AUTO = "auto"  # the bits of each linear are chosen with its masks


@dataclass(frozen=True)
class Request:
    """A budget with exactly one reduction, and the formats that weights may have.

    flops_reduction   the fraction to save of the FLOPs of the blocks' linears
    time_reduction    the fraction to save of the time that these linears take for one token
    times             the measured times, if there is a `time_reduction`
    max_memory        the bytes that these linears may store: weights, biases, thresholds and norms
    search            the settings of the search, for a method that searches
    formats           of the weights of these linears. Several: the plan chooses one for each adapter
    lm_head_formats   of the weight of lm_head
    bytes_reduction   the fraction to save of the bytes that a token reads in these linears and lm_head
    """

    method: str
    flops_reduction: float | None = None
    time_reduction: float | None = None
    times: LatencyTable | None = None
    max_memory: int | None = None
    search: Search | None = field(default=None, repr=False)
    formats: tuple[Format, ...] = (FLOAT,)
    lm_head_formats: tuple[Format, ...] = (FLOAT,)
    bytes_reduction: float | None = None

    def __post_init__(self) -> None:
        if sum(asked is not None for asked in self._reductions.values()) != 1:
            has = ", ".join(f"{unit} is {asked}" for unit, asked in self._reductions.items())
            raise ValueError(f"{has}: wanted exactly one of them")
        if not 0 < self.reduction < 1:
            raise ValueError(f"{self.unit} is {self.reduction}, wanted more than 0 and less than 1")
        if (self.time_reduction is None) != (self.times is None):
            has = "given" if self.times else "None"
            raise ValueError(
                f"time_reduction is {self.time_reduction} and times are {has}, wanted both or neither: "
                "measure them with rana_kernels.allocation.latency_measurement.measure_latency(model)"
            )
        if self.times is not None and self.quantized:
            raise ValueError(
                f"bits is {self._bits(self.formats)} and times are given, wanted flops_reduction or "
                "bytes_reduction: the times are of weights in 16 bits"
            )
        for name, formats in (("bits", self.formats), ("lm_head_bits", self.lm_head_formats)):
            if len(formats) > 1 and not self.in_bytes:
                raise ValueError(f"{name} is {AUTO!r} and {self.unit} is given, wanted bytes_reduction")
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"max_memory is {self.max_memory}, wanted a positive number of bytes")

    @property
    def _reductions(self) -> dict[str, float | None]:
        return {
            "flops_reduction": self.flops_reduction,
            "time_reduction": self.time_reduction,
            "bytes_reduction": self.bytes_reduction,
        }

    @property
    def unit(self) -> str:
        """The name of the reduction that was given."""
        return next(unit for unit, asked in self._reductions.items() if asked is not None)

    @property
    def reduction(self) -> float:
        asked = self._reductions[self.unit]
        assert asked is not None, "unit is that of the one that is given"
        return asked

    @property
    def in_bytes(self) -> bool:
        """Whether the budget is one of bytes. It then includes lm_head, which may get masks."""
        return self.bytes_reduction is not None

    @property
    def quantized(self) -> bool:
        """Whether weights of the blocks may be quantised."""
        return self.formats != (FLOAT,)

    @property
    def changes_head(self) -> bool:
        """Whether lm_head may get bits or masks."""
        return self.in_bytes or self.lm_head_formats != (FLOAT,)

    @property
    def pricing(self) -> Pricing:
        """How the choices of the blocks' linears are priced."""
        return Pricing(self.formats, self.times, self.in_bytes)

    @property
    def head_pricing(self) -> Pricing:
        """How the choices of lm_head are priced, in a budget of bytes."""
        return Pricing(self.lm_head_formats, in_bytes=True)

    def record(self, adapters: tuple[AdapterSpec, ...] = (), lm_head: AdapterSpec | None = None) -> Plan:
        """Return the plan that answers this request with `adapters`."""
        return Plan(
            adapters, self.method, self.flops_reduction, self.time_reduction, self.max_memory,
            self.bytes_reduction, lm_head,
        )  # fmt: skip

    @staticmethod
    def _bits(formats: tuple[Format, ...]) -> object:
        return AUTO if len(formats) > 1 else formats[0].bits


def formats(
    model: nn.Module, bits: int | str, group: int | None, lm_head_bits: int | str | None
) -> tuple[tuple[Format, ...], tuple[Format, ...]]:
    """Return the formats that the linears and lm_head may have.

    bits, group    of the linears; "auto": any width. `group` does not matter with 16 bits
    lm_head_bits   None: as `bits`, if the model has an lm_head that is a linear

    Raises ValueError for numbers that are no format, or if there is no lm_head to round.
    """
    block = head_block(model)
    if lm_head_bits is None:
        lm_head_bits = bits if block else 16
    own, head = (_widths(width, group) for width in (bits, lm_head_bits))
    if head != (FLOAT,):
        require_head(model)
    return own, head


def _widths(bits: int | str, group: int | None) -> tuple[Format, ...]:
    widths = WIDTHS if bits == AUTO else (bits,)
    return tuple(Format(width, None if width == 16 else group) for width in widths)  # type: ignore[arg-type]
