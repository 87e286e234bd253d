"""The benchmarked cases: shapes of known models, one layer in many ways, and the published cases."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from bench.kernels.case import Case
from bench.kernels.layers import Linear, Lowrank, Mlp, NeuronMlp, Neurons

COST_RATIO = 0.56  # of the dense cost; also the live share of the stored ranks that sizes them
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class Model:
    """Features of hidden states, queries, keys (and of values), neurons, and the number of blocks."""

    hidden: int
    queries: int
    keys: int
    neurons: int
    blocks: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) of the linears of a block; q, k and v count as one."""
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


def stored_ranks(K: int, N: int, cost_ratio: float = COST_RATIO, density: float = COST_RATIO) -> int:
    """Return how many ranks, `density` of them live, cost `cost_ratio` of a dense layer K -> N."""
    exact = cost_ratio * K * N / (K + density * N)
    return max(RANK_MULTIPLE, RANK_MULTIPLE * round(exact / RANK_MULTIPLE))


def cases(model: Model, density: float = COST_RATIO, M: int = 1, dtype: str = "bf16") -> dict[str, Case]:
    """Return a case for each linear, and "mlp" for a whole MLP in one op. `density`: live of stored rows."""
    found: dict[str, Case] = {}
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
) -> list[Case]:
    """Return the cases of every combination, each once. Raise KeyError for an unknown model."""
    settings = product(models, dtypes, tokens, densities)
    found = (cases(MODELS[model], density, M, dtype).values() for model, dtype, M, density in settings)
    return list(dict.fromkeys(case for some in found for case in some))


# cost ratio 0.56 on the up projection of Llama-2-7B, at three splits into stored and live ranks
SPLITS = ((2048, 1532), (2464, 1377), (3072, 1151))
DECODE: list[Case] = [
    *(Lowrank(4096, 11008, R, live, 1, dtype) for dtype in ("bf16", "fp32") for R, live in SPLITS),
    *(Lowrank(4096, 11008, 2464, 1377, M, dtype) for dtype in ("bf16", "fp32") for M in (2, 4, 8)),
    Lowrank(4096, 11008, 2464, 1377, 1, "fp16"),
    *(Neurons(11008, 4096, live, 1, dtype) for dtype in ("bf16", "fp32") for live in (11008, 5504, 2752)),
    Mlp(4096, 11008, 2464, 1377, 6164, 1, "bf16"),
    Mlp(2048, 8192, 1152, 842, 4587, 1, "bf16"),
]
# the same layer at other densities, for the plot
DENSITY: list[Case] = [Lowrank(4096, 11008, 2464, live, 1, "bf16") for live in (123, 616, 1232, 1848, 2464)]
PREFILL: list[Case] = [
    Lowrank(4096, 11008, 2464, 1377, M, dtype) for dtype in ("bf16", "fp32") for M in (16, 64, 256)
]
# one token through every linear of every model, also square and tiny ones, where little or nothing is gained
NAMED: list[Case] = grid(MODELS, [COST_RATIO], [1], ["bf16"])
PUBLISHED: list[Case] = list(dict.fromkeys([*DECODE, *DENSITY, *PREFILL, *NAMED]))


def in_bits(model: Model, cost_ratio: float, M: int) -> list[Case]:
    """Return the ops on shapes of a model at one cost, each with weights of 16, 8 and 4 bits."""
    K, I = model.linears["up"]  # noqa: E741
    R = min(K, stored_ranks(K, I, cost_ratio))
    live, neurons = round((cost_ratio * I - R) * K / I), round(cost_ratio * I)
    found: list[Case] = [
        Neurons(I, K, neurons, M, "bf16"),
        NeuronMlp(K, I, round(cost_ratio * K), neurons, M, "bf16"),
        Mlp(K, I, R, live, neurons, M, "bf16"),
    ]
    return [replace(case, bits=bits) for case in found for bits in BITS]


# one token at several costs, then more tokens at one cost
COST_RATIOS, TOKENS, BITS = (1.0, 0.8, 0.7, COST_RATIO), (2, 4, 8, 16, 64, 256), (16, 8, 4)
QUANTIZED_COST_RATIO = 0.7
QUANTIZED: list[Case] = [
    *(Linear(4096, 11008, M, "bf16", bits) for M in (1, *TOKENS) for bits in BITS),
    *(case for cost_ratio in COST_RATIOS for case in in_bits(MODELS["Llama-2-7B"], cost_ratio, 1)),
    *(case for M in TOKENS for case in in_bits(MODELS["Llama-2-7B"], QUANTIZED_COST_RATIO, M)),
]
