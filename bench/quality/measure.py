"""One evaluation for all: perplexity and cost of a candidate over the same tokens, in one pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.quality.contenders import Candidate
from bench.quality.subject import BATCH
from rana_kernels.evaluation.density import Costs
from rana_kernels.evaluation.live import LiveCount, count_live
from rana_kernels.evaluation.metrics import token_losses

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass
class Row:
    """One contender at one budget.

    budget      the cost wanted, as a fraction of the dense cost of the linears in `scope`
    asked       what the method was asked for, so that it comes to that
    keep        the cost measured on the evaluation text; `tokens` has its quantiles over tokens
    layers      what each layer's outputs keep of their energy (`layers.py`)
    over_dense  the fraction by which its perplexity exceeds that of the dense model
    failed      why there is none; the numbers are then missing
    """

    scope: str
    method: str
    recovered: bool
    budget: float
    asked: float | None = None
    keep: float | None = None
    perplexity: float | None = None
    over_dense: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""

    @property
    def key(self) -> str:
        recovered = " recovered" if self.recovered else ""
        return f"{self.scope} {self.method} {self.budget:.2f}{recovered}"


@dataclass
class Measured:
    """losses [n, T - 1] in nats · counts of kept rows, over the n·T tokens."""

    losses: Tensor
    counts: dict[str, LiveCount]

    @property
    def perplexity(self) -> float:
        return float(self.losses.double().mean().exp())

    def spread(self, costs: Costs) -> dict[str, float]:
        """Quantiles over tokens of what a token costs."""
        if not costs.row:
            return {}
        keep = costs.cost_ratio_of_tokens(self.counts)
        return {name: float(keep.quantile(share)) for name, share in QUANTILES.items()}


def measure(model: nn.Module, rows: Tensor) -> Measured:
    with torch.inference_mode(), count_live(model) as counts:
        losses = token_losses(model, rows, batch=BATCH, progress=False)
    return Measured(losses, counts)


def fill(row: Row, candidate: Candidate, rows: Tensor, dense: float) -> None:
    """Measure `candidate` on `rows`; `dense` is the dense model's perplexity there."""
    found = measure(candidate.model, rows)
    row.perplexity = found.perplexity
    row.over_dense = found.perplexity / dense - 1
    row.keep = candidate.costs.cost_ratio(found.counts)
    row.tokens = found.spread(candidate.costs)
