"""The interface of a method of allocation: the statistics that it needs, and its decision for each block."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from rana_kernels.allocation.request import Request
from rana_kernels.allocation.specs import dense_spec
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.architectures import Block
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats

# Returns the adapters of one block, in the order in which the model calls its linears.
Chooser = Callable[[CalibratedBlock], list[AdapterSpec]]


class Method(ABC):
    """One way to spend a budget.

    name           its name for `method=` and `--method`
    summary        a few words for the help text
    needs          the arguments of `calibrate` that collect its statistics
    any_budget     whether it accepts `time_reduction` and `max_memory` besides `flops_reduction`
    in_bytes       whether it accepts `bytes_reduction`
    searches       whether it measures plans, and so needs a `Search`
    """

    name: str
    summary: str
    needs: dict[str, Any]
    any_budget = False
    in_bytes = False
    searches = False

    def check(self, model: nn.Module, blocks: list[Block], request: Request) -> None:
        """Raise ValueError for a request out of reach, if this is known before calibration."""
        if request.times:
            request.times.require(model, blocks)

    @abstractmethod
    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        """Do the work that concerns the whole model, and return the function that decides block by block.

        store   keeps measurements, so that the same call continues after an interruption

        Raises ValueError for a request out of reach, or if statistics are missing.
        """


def chooser_of(plan: Plan) -> Chooser:
    """Return the chooser that looks each block up in a finished plan."""
    by_name = {name: adapter for adapter in plan.all_adapters for name in adapter.names}

    def choose(calibrated: CalibratedBlock) -> list[AdapterSpec]:
        if calibrated.block.head and calibrated.block.head not in by_name:
            return [dense_spec(calibrated, calibrated.block.head)]
        return list(dict.fromkeys(by_name[name] for name in calibrated.block.linears))

    return choose
