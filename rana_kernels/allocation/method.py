"""What every method of allocation is: statistics that it needs, and a decision for each block."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from rana_kernels.allocation.request import Request
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.model.architectures import Block
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats

# Decides what the linears of one block become, in the order in which the model calls them.
Chooser = Callable[[CalibratedBlock], list[AdapterSpec]]


class Method(ABC):
    """One way to spend a budget.

    name           what `method=` and `--method` call it
    summary        one line about it for people
    needs          the arguments of `calibrate` that collect what it reads
    any_budget     whether it takes budgets other than FLOPs: `time_reduction` and `max_memory`
    searches       whether it measures plans, and so wants a `Search`
    """

    name: str
    summary: str
    needs: dict[str, Any]
    any_budget = False
    searches = False

    def check(self, model: nn.Module, blocks: list[Block], request: Request) -> None:
        """Raise ValueError for a request out of reach, if that can be told before anything is measured."""
        if request.latency:
            request.latency.require(model, blocks)

    @abstractmethod
    def prepare(
        self, stats: Stats, request: Request, store: ResumeDir | None = None, progress: bool = True
    ) -> Chooser:
        """Do what has to be done for the whole model first, and return what decides block by block.

        store   keeps measurements, for the same call after an interruption. Raises ValueError for a request out
                of reach, or statistics that lack what the method needs
        """


def chooser_of(plan: Plan) -> Chooser:
    """Return the chooser that looks each block up in a finished plan."""
    by_name = {name: adapter for adapter in plan.adapters for name in adapter.names}
    return lambda calibrated: list(dict.fromkeys(by_name[name] for name in calibrated.block.linears))
