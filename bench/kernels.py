"""What is benchmarked: one layer in many ways, and the linears of models that people know."""

from bench.linears import Lowrank, Neurons
from bench.mlp import Mlp
from bench.models import KEEP, MODELS, grid

Case = Lowrank | Neurons | Mlp

# keep 0.56 on the up and gate projections of Llama-2-7B, at three splits into stored and kept ranks
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
# one token, every linear of every model: square ones and tiny ones too, where little or nothing is gained
NAMED: list[Case] = grid(MODELS, [KEEP], [1], ["bf16"])
PUBLISHED: list[Case] = list(dict.fromkeys([*DECODE, *DENSITY, *PREFILL, *NAMED]))
