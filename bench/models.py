"""Shapes of models that people know, and what is benchmarked of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.linears import Lowrank, Neurons
from bench.mlp import Mlp

KEEP = 0.56  # of the dense cost, at density KEEP: where the stored ranks come from
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class Model:
    """Features of its hidden states, of queries, of keys (and of values), and neurons; its blocks."""

    hidden: int
    queries: int
    keys: int
    neurons: int
    blocks: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) of the linears of a block, q, k and v as one."""
        return {
            "q/k/v": (self.hidden, self.queries + 2 * self.keys),
            "o": (self.queries, self.hidden),
            "up": (self.hidden, self.neurons),
            "gate": (self.hidden, self.neurons),
            "down": (self.neurons, self.hidden),
        }


MODELS = {
    "Llama-2-7B": Model(4096, 4096, 4096, 11008, 32),
    "Llama-3-8B": Model(4096, 4096, 1024, 14336, 32),
    "Llama-3.2-1B": Model(2048, 2048, 512, 8192, 16),
    "Llama-3.2-3B": Model(3072, 3072, 1024, 8192, 28),
    "Qwen3-0.6B": Model(1024, 2048, 1024, 3072, 28),
    "Qwen3-4B": Model(2560, 4096, 1024, 9728, 36),
    "Gemma-2-2B": Model(2304, 2048, 1024, 9216, 26),
    "demo model": Model(256, 256, 128, 688, 6),
}
# too large to run here: only for estimates
LARGE = {
    "Llama-3-70B": Model(8192, 8192, 1024, 28672, 80),
    "Llama-3.1-405B": Model(16384, 16384, 1024, 53248, 126),
}


def stored_ranks(K: int, N: int, keep: float = KEEP, density: float = KEEP) -> int:
    """R of which so many live cost `keep` of the dense layer K -> N."""
    exact = keep * K * N / (K + density * N)
    return max(RANK_MULTIPLE, RANK_MULTIPLE * round(exact / RANK_MULTIPLE))


def cases(
    model: Model, density: float = KEEP, M: int = 1, dtype: str = "bf16"
) -> dict[str, Lowrank | Neurons | Mlp]:
    """By name of the linear, or "mlp" for all three of it in one op. `density`: live of the stored rows."""
    found: dict[str, Lowrank | Neurons | Mlp] = {}
    for name in ("q/k/v", "o", "up"):
        K, N = model.linears[name]
        R = stored_ranks(K, N)
        found[name] = Lowrank(K, N, R, round(density * R), M, dtype)
    live = round(density * model.neurons)
    R = stored_ranks(model.hidden, model.neurons)
    found["down"] = Neurons(model.neurons, model.hidden, live, M, dtype)
    found["mlp"] = Mlp(model.hidden, model.neurons, R, round(density * R), live, M, dtype)
    return found


def grid(
    models: Iterable[str], densities: Iterable[float], tokens: Iterable[int], dtypes: Iterable[str]
) -> list[Lowrank | Neurons | Mlp]:
    """Every combination, each problem once. KeyError for a model that is not known."""
    return list(
        dict.fromkeys(
            case
            for model in models
            for dtype in dtypes
            for M in tokens
            for density in densities
            for case in cases(MODELS[model], density, M, dtype).values()
        )
    )
