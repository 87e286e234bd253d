"""What compressing costs: measured on single blocks of several sizes, and what follows for whole models.

decompose a linear     s ≈ a·n³ + b·n²·m              n, m: the smaller and the larger of its sizes
compress a block       s ≈ c·Σ n²·m + d·Σ n·m         over q/k/v, o, up, gate and down
calibrate on a token   s ≈ e·Σ (n·m + n²)             the linears, and the second moments of what they read
"""

import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rana_kernels as rana
from bench.fits import Fit, fit
from bench.models import LARGE, MODELS, Model
from rana_kernels.decompose import decompose

LINEARS = [(1024, 1024), (2752, 1024), (1024, 2752), (2048, 2048), (5504, 2048), (2048, 5504), (11008, 4096)]
BLOCKS = [512, 1024, 2048]  # hidden sizes; the rest in the proportions of Llama-2-7B
ESTIMATED = {**{name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-2-7B")}, **LARGE}
ROWS, LENGTH = 8, 512  # calibration of a measured block
CALIBRATION = 65536  # tokens, for estimates


def cost(linears: list[tuple[int, int]], hidden: list[int]) -> dict[str, Any]:
    """Measurements, fits and estimates. Fits of two coefficients want two sizes, residuals more."""
    pieces = [{"N": N, "K": K, "seconds": round(seconds_of(N, K), 4)} for N, K in linears]
    blocks = [block(size) for size in hidden]
    shapes = [block_shape(size) for size in hidden]
    linear = fit([cubes(p["N"], p["K"]) for p in pieces], [p["seconds"] for p in pieces])
    compress = fit([work(shape) for shape in shapes], [b["compress"] for b in blocks])
    calibrate = fit(
        [{"token": reads(shape)} for shape in shapes], [b["calibrate"] / (ROWS * LENGTH) for b in blocks]
    )
    return {
        "linears": pieces,
        "blocks": blocks,
        "fits": {
            name: {"coefficients": found.coefficients, "residuals": [round(r, 3) for r in found.residuals]}
            for name, found in (("decompose", linear), ("compress", compress), ("calibrate", calibrate))
        },
        "tokens": CALIBRATION,
        "estimates": {name: estimate(m, compress, calibrate) for name, m in ESTIMATED.items()},
    }


def seconds_of(N: int, K: int) -> float:
    """To decompose a linear K -> N, from the moment that calibration keeps of it."""
    size = min(N, K)
    x = torch.randn(size, size, dtype=torch.float64)
    weight = torch.randn(N, K) * K**-0.5
    begin = time.perf_counter()
    decompose(weight, x @ x.T / size)
    return time.perf_counter() - begin


def block_shape(hidden: int) -> Model:
    neurons = round(hidden * 11008 / 4096 / 16) * 16
    return Model(hidden, hidden, hidden, neurons, 1)


def block(hidden: int) -> dict[str, Any]:
    """Seconds of the steps of `rana.compress` on a Llama of one block, random, read by random tokens."""
    shape = block_shape(hidden)
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=shape.neurons, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(256, (ROWS, LENGTH))
    begin = time.perf_counter()
    stats = rana.calibrate(model, tokens.split(4), progress=False)
    middle = time.perf_counter()
    rana.compress(model, stats=stats, flops_reduction=0.44, progress=False)
    end = time.perf_counter()
    return {"hidden": hidden, "calibrate": round(middle - begin, 3), "compress": round(end - middle, 3)}


def cubes(N: int, K: int) -> dict[str, float]:
    n, m = sorted((N, K))
    return {"n³": float(n) ** 3, "n²m": float(n) ** 2 * m}


def work(model: Model) -> dict[str, float]:
    sizes = [sorted(shape) for shape in model.linears.values()]
    return {"n²m": float(sum(n * n * m for n, m in sizes)), "nm": float(sum(n * m for n, m in sizes))}


def reads(model: Model) -> float:
    """Multiply-adds of a token through the linears of a block, and into the second moments."""
    moments = {"qkv": model.hidden, "o": model.queries, "mlp": model.hidden, "down": model.hidden}
    return float(sum(K * N for K, N in model.linears.values()) + sum(n * n for n in moments.values()))


def estimate(model: Model, compress: Fit, calibrate: Fit) -> dict[str, float]:
    """Hours on this machine, and gigabytes of the largest second moment."""
    work_hours = model.blocks * compress.predict(work(model)) / 3600
    read_hours = model.blocks * CALIBRATION * calibrate.predict({"token": reads(model)}) / 3600
    return {
        "calibrate h": round(read_hours, 2),
        "compress h": round(work_hours, 2),
        "moment GB": round(8 * max(model.hidden, model.queries) ** 2 / 1e9, 2),
        "moments GB": round(8 * model.blocks * (3 * model.hidden**2 + model.queries**2) / 1e9, 1),
    }
