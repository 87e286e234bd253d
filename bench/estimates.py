"""What compressing a model takes by the default method: work counted, time from fits of measured pieces.

decompose a linear     s ≈ a·n³ + b·N·K²           n: the smaller of its sizes, of the eigenproblem; N·K²: the
                                                   products around it, if it starts from its inputs' moment
the rest of a block    s ≈ c·Σ N·K + d·Σ (N + K)   errors of adapters on the sample, thresholds, modules
read a token           s ≈ e·Σ (N·K + n²) + f·Σ (N + K)   the linears, and the moments of what they read
differentiate a token  s ≈ g·Σ N·K + h·Σ (N + K)   forward and back
"""

from dataclasses import dataclass

from bench.fits import Fit
from bench.models import Model
from rana_kernels.statistics.fisher import TOKENS as DIFFERENTIATED

CALIBRATION = 65536  # tokens


@dataclass(frozen=True)
class Decomposition:
    """Of a linear K -> N, from the second moment of its inputs, or else of its outputs."""

    N: int
    K: int
    of_inputs: bool

    @property
    def work(self) -> dict[str, float]:
        return {"n³": float(min(self.N, self.K)) ** 3, "N·K²": float(self.N * self.K**2 * self.of_inputs)}


def decompositions(model: Model) -> list[Decomposition]:
    """Of one block: every linear alone and those of one input together, to plan; then, for the modules,
    every input's once more, as if q, k and v, and up and gate, were always better off together."""
    q, k = (model.queries, model.hidden), (model.keys, model.hidden)
    wide = (model.neurons, model.hidden)
    inputs = [[q, k, k], [(model.hidden, model.queries)], [wide, wide], [(model.hidden, model.neurons)]]
    found = []
    for linears in inputs:
        # calibration keeps the outputs' moment where one linear reads an input and has fewer of those
        of_inputs = len(linears) > 1 or linears[0][0] >= linears[0][1]
        joint = (sum(N for N, _ in linears), linears[0][1])
        planned = [*linears, joint] if len(linears) > 1 else linears
        found += [Decomposition(N, K, of_inputs) for N, K in [*planned, joint]]
    return found


def rest(model: Model) -> dict[str, float]:
    return {"N·K": _products(model), "N + K": _features(model)}


def reading(model: Model) -> dict[str, float]:
    """Of a token: also the moments, and the product that down's is of."""
    moments = 3 * model.hidden**2 + model.queries**2
    down = model.neurons * model.hidden
    return {"N·K + n²": _products(model) + down + moments, "N + K": _features(model)}


def differentiating(model: Model) -> dict[str, float]:
    return {"N·K": _products(model), "N + K": _features(model)}


def _products(model: Model) -> float:
    return float(sum(K * N for K, N in model.linears.values()))


def _features(model: Model) -> float:
    return float(sum(K + N for K, N in model.linears.values()))


def block_seconds(model: Model, fits: dict[str, Fit], tokens: int) -> dict[str, float]:
    """Of one block, step by step; `tokens` of calibration, of which the first are differentiated."""
    return {
        "read": tokens * fits["read"].predict(reading(model)),
        "differentiate": min(tokens, DIFFERENTIATED) * fits["differentiate"].predict(differentiating(model)),
        "decompose": sum(fits["decompose"].predict(d.work) for d in decompositions(model)),
        "rest": fits["rest"].predict(rest(model)),
    }


def estimate(model: Model, fits: dict[str, Fit]) -> dict[str, float]:
    """Hours of each step for all blocks; gigabytes of the largest second moment, and of all of them."""
    seconds = block_seconds(model, fits, CALIBRATION)
    hours = {f"{step} h": model.blocks * value / 3600 for step, value in seconds.items()}
    moments = [8 * size**2 / 1e9 for size in (*[model.hidden] * 3, model.queries)]
    found = {
        **hours,
        "all h": sum(hours.values()),
        "moment GB": max(moments),
        "moments GB": model.blocks * sum(moments),
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}
