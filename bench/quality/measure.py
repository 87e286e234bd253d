"""Faithfulness, perplexity, cost and kept energy of a candidate, and candidates of equal cost.

Thresholds come from the calibration text, and on other text they keep a little more or less; methods differ
in how much. So the cost of a candidate is measured, and another one with a corrected budget is built, until
the two agree.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bench.quality.subject import BATCH, Candidate, Subject, some_rows
from rana_kernels.evaluation.density import Costs
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.live import LiveCount, count_live
from rana_kernels.evaluation.metrics import count_live_rows, token_losses

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
TOLERANCE = 0.005  # of the dense cost
COMPARED = 16_384  # tokens of the text on which predictions are compared with the dense model's
FIT_ROWS = 16  # rows of the evaluation text, spread over it, that measure the cost for `fit`
TRIES = 4


@dataclass
class Row:
    """One contender at one budget.

    budget      the wanted cost, as a fraction of the dense cost of the linears in `scope`
    asked       the budget that the method was given, so that it comes to that cost
    cost_ratio  the cost measured on the evaluation text; `tokens` has its quantiles over tokens
    kl, agreed  the divergence from the dense model's predictions (`rana_kernels.evaluation.divergence`)
    layers      the share of its energy that each layer's output keeps (`kept_energy`), at one budget alone
    over_dense  the fraction by which its perplexity exceeds that of the dense model
    failed      why there is no candidate; the numbers are then missing
    """

    scope: str
    method: str
    recovered: bool
    budget: float
    asked: float | None = None
    cost_ratio: float | None = None
    kl: float | None = None
    agreed: float | None = None
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
    """losses [n, T - 1] in nats · counts of live rows, over the n·T tokens."""

    losses: Tensor
    counts: dict[str, LiveCount]

    @property
    def perplexity(self) -> float:
        return float(self.losses.double().mean().exp())

    def spread(self, costs: Costs) -> dict[str, float]:
        """Return quantiles over tokens of the cost of a token."""
        if not costs.row:
            return {}
        found = costs.cost_ratio_of_tokens(self.counts)
        return {name: float(found.quantile(share)) for name, share in QUANTILES.items()}


def measure(model: nn.Module, token_ids: Tensor) -> Measured:
    with torch.inference_mode(), count_live(model) as counts:
        losses = token_losses(model, token_ids, batch=BATCH, progress=False)
    return Measured(losses, counts)


def fill(row: Row, candidate: Candidate, subject: Subject, token_ids: Tensor, dense: float) -> None:
    """Measure `candidate` on `token_ids`. `dense` is the dense model's perplexity there."""
    some = some_rows(token_ids, COMPARED)
    compared = divergence(candidate.model, subject.dense, some, batch=BATCH, progress=False)
    row.kl, row.agreed = compared.kl, compared.agreed
    found = measure(candidate.model, token_ids)
    row.perplexity = found.perplexity
    row.over_dense = found.perplexity / dense - 1
    row.cost_ratio = candidate.costs.cost_ratio(found.counts)
    row.tokens = found.spread(candidate.costs)


def fit(
    build: Callable[[float], Candidate], cost_ratio: float, token_ids: Tensor, first: float | None = None
) -> tuple[Candidate, float]:
    """Return a candidate that costs `cost_ratio` on some of `token_ids`, and the budget that gave it.

    first   the budget to begin with; None: `cost_ratio`

    Raise ValueError for a cost that the method cannot meet.
    """
    some = some_rows(token_ids, FIT_ROWS * token_ids.shape[1])
    asked, tried = first or cost_ratio, []
    for _ in range(TRIES):
        candidate = build(asked)
        found = measured_cost(candidate, some)
        tried.append((abs(found - cost_ratio), asked, found, candidate))
        # ranks are whole numbers, so a slightly larger budget may change nothing
        if tried[-1][0] <= TOLERANCE / 2 or found in (cost for _, _, cost, _ in tried[:-1]):
            break
        asked += cost_ratio - found
    miss, asked, found, candidate = min(tried, key=lambda entry: entry[0])
    if miss > TOLERANCE:
        raise ValueError(f"asked for {asked:.3f} it costs {found:.3f}, wanted {cost_ratio}")
    return candidate, asked


def measured_cost(candidate: Candidate, token_ids: Tensor) -> float:
    if not candidate.costs.row:
        return candidate.costs.cost_ratio({})
    counts = count_live_rows(candidate.model, token_ids, batch=BATCH, progress=False)
    return candidate.costs.cost_ratio(counts)


@torch.inference_mode()
def kept_energy(subject: Subject, model: nn.Module, token_ids: Tensor) -> dict[str, list[float]]:
    """Return {"qkv", "mlp": one share a layer}: the share of its output's energy that each layer keeps.

    A layer of `model` reads the dense layer's input. The share is 1 - ‖y - ŷ‖² / ‖y‖² over the tokens. Blocks
    whose MLP is no module of its own have no "mlp".
    """
    lost, whole = Counter[str](), Counter[str]()

    def compare(name: str, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        lost[name] += float((y.double() - model.get_submodule(name)(inputs[0]).double()).square().sum())
        whole[name] += float(y.double().square().sum())

    parts = {
        "qkv": [block.qkv for block in subject.blocks if block.qkv],
        "mlp": [(block.mlp,) for block in subject.blocks if block.mlp],
    }
    names = [name for groups in parts.values() for group in groups for name in group]
    hooks = [subject.dense.get_submodule(n).register_forward_hook(partial(compare, n)) for n in names]
    try:
        for part in token_ids.split(BATCH):
            subject.dense(input_ids=part.to(subject.dense.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        part: [1 - sum(lost[n] for n in group) / sum(whole[n] for n in group) for group in groups]
        for part, groups in parts.items()
        if groups
    }
