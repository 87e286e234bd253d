"""`python -m bench.cost`: time the steps of a compression on blocks, and estimate whole models from them.

Work is counted, and time follows from fits of measured pieces:

    decompose a linear     s ≈ a·n³ + b·N·K²                n: the smaller of its sizes, of the eigenproblem;
                                                            N·K²: the products, from the moment of its inputs
    the rest of a block    s ≈ c·Σ N·K + d·Σ (N + K)        errors of adapters, thresholds, modules
    read a token           s ≈ e·Σ (N·K + n²) + f·Σ (N + K) the linears, and the moments of their inputs
    differentiate a token  s ≈ g·Σ N·K + h·Σ (N + K)        forward and back
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import rana_kernels as rana
from bench.kernels.cases import LARGE, MODELS, Model
from bench.kernels.timing import timed
from bench.report.fits import Fit, fit
from bench.report.results import RESULTS, conditions, processor, write_json
from rana_kernels.statistics import block as calibrated_block
from rana_kernels.statistics.decomposition import decompose
from rana_kernels.statistics.fisher import TOKENS as DIFFERENTIATED


@dataclass(frozen=True)
class Decomposition:
    """The decomposition of a linear K -> N from the second moment of its inputs, or else of its outputs."""

    N: int
    K: int
    of_inputs: bool

    @property
    def work(self) -> dict[str, float]:
        return {"n³": float(min(self.N, self.K)) ** 3, "N·K²": float(self.N * self.K**2 * self.of_inputs)}


LINEARS = [
    Decomposition(N, K, of_inputs=N >= K)
    for N, K in (
        (1024, 1024), (2752, 1024), (1024, 2752), (2048, 2048), (5504, 2048), (2048, 5504), (11008, 4096),
    )
]  # fmt: skip
BLOCKS = [512, 1024, 1536, 2048]  # hidden sizes; other sizes are in the proportions of Llama-2-7B
CHECKED = 3072  # hidden size of a block that the fits have not seen
ESTIMATED = {**{name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-2-7B")}, **LARGE}
CALIBRATION = 65536  # tokens, of the estimates
ROWS, LENGTH = 8, 512  # calibration of a measured block: as many tokens as a sample has
STEPS = ("read", "differentiate", "decompose", "rest")


def main(
    output: Annotated[
        Path | None, typer.Option(help="JSON; default bench/results/cost-<processor>.json.")
    ] = None,
) -> None:
    """Time decompositions, and calibration and compression of blocks. Fit, and estimate whole models.

    Example:  python -m bench.cost
    """
    stamp = conditions()
    typer.echo(f"{stamp}\ntiming decompositions, calibration and compression")
    path = output or RESULTS / f"cost-{processor()}.json"
    write_json(path, stamp, cost(LINEARS, BLOCKS, CHECKED))
    typer.echo(f"wrote {path}")


def cost(linears: list[Decomposition], hidden: list[int], checked: int) -> dict[str, Any]:
    """Return measurements (of two sizes or more), fits, estimates, and a block beside its estimate."""
    pieces = [round(seconds_of(linear), 4) for linear in linears]
    blocks = [measure_block(size) for size in hidden]
    fits = fits_of(linears, pieces, blocks)
    found, shape = measure_block(checked), block_shape(checked)
    expected = block_seconds(shape, fits, ROWS * LENGTH)
    return {
        "linears": [{"N": d.N, "K": d.K, "seconds": s} for d, s in zip(linears, pieces, strict=True)],
        "blocks": blocks,
        "fits": {
            name: {"coefficients": f.coefficients, "residuals": f.rounded_residuals}
            for name, f in fits.items()
        },
        "check": {
            "measured": found,
            "estimated": {step: round(seconds, 3) for step, seconds in expected.items()},
            "counted": len(decompositions(shape)),
        },
        "sample": ROWS * LENGTH,
        "assumed": {"tokens": CALIBRATION, "differentiated": DIFFERENTIATED, "length": LENGTH},
        "estimates": {name: estimate(model, fits) for name, model in ESTIMATED.items()},
    }


# measuring


def seconds_of(linear: Decomposition) -> float:
    """Time the decomposition of a random linear, from the moment that calibration keeps of it."""
    size = linear.K if linear.of_inputs else linear.N
    x = torch.randn(size, size, dtype=torch.float64)
    weight = torch.randn(linear.N, linear.K) * linear.K**-0.5
    moment = x @ x.T / size
    return timed(decompose, weight, moment)[0]


def measure_block(hidden: int) -> dict[str, Any]:
    """Time the steps of `rana.compress` on a random Llama of one block and random tokens.

    "read" is a calibration without gradients, and "differentiate" is what gradients add to it.
    """
    torch.manual_seed(0)
    model, tokens = random_block(hidden), torch.randint(256, (ROWS, LENGTH))
    batches = tokens.split(4)
    read, _ = timed(rana.calibrate, model, batches, gradients=False, progress=False)
    both, stats = timed(rana.calibrate, model, batches, progress=False)
    with timed_decompositions() as decomposed:
        compress, _ = timed(rana.compress, model, stats=stats, flops_reduction=0.44, progress=False)
    seconds = (read, both - read, sum(decomposed), compress - sum(decomposed))
    return {
        "hidden": hidden,
        **{step: round(value, 3) for step, value in zip(STEPS, seconds, strict=True)},
        "decompositions": len(decomposed),
    }


def random_block(hidden: int) -> LlamaForCausalLM:
    heads = max(1, hidden // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=hidden, intermediate_size=block_shape(hidden).neurons,
            num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads,
        )
    )  # fmt: skip


def block_shape(hidden: int) -> Model:
    neurons = round(hidden * 11008 / 4096 / 16) * 16
    return Model(hidden, hidden, hidden, neurons, 1)


@contextmanager
def timed_decompositions() -> Iterator[list[float]]:
    """Yield a list that fills with the seconds of every decomposition within the context."""
    seconds: list[float] = []

    def decompose_timed(*arguments: Any) -> Any:
        taken, factors = timed(decompose, *arguments)
        seconds.append(taken)
        return factors

    with patch.object(calibrated_block, "decompose", decompose_timed):
        yield seconds


# counting


def decompositions(model: Model) -> list[Decomposition]:
    """Return the decompositions of one block.

    To plan, every linear is decomposed alone, and jointly with those of the same input. For the modules every
    input is decomposed once more: q, k and v, and up and gate, are taken to be joint.
    """
    q, k = (model.queries, model.hidden), (model.keys, model.hidden)
    wide = (model.neurons, model.hidden)
    inputs = [[q, k, k], [(model.hidden, model.queries)], [wide, wide], [(model.hidden, model.neurons)]]
    found = []
    for linears in inputs:
        # calibration keeps the outputs' moment where one linear reads an input and has fewer outputs
        of_inputs = len(linears) > 1 or linears[0][0] >= linears[0][1]
        joint = (sum(N for N, _ in linears), linears[0][1])
        planned = [*linears, joint] if len(linears) > 1 else linears
        found += [Decomposition(N, K, of_inputs) for N, K in [*planned, joint]]
    return found


def work_of(model: Model) -> dict[str, dict[str, float]]:
    """Return the work of each step of one block, but of its decompositions; reading is that of a token."""
    shapes = model.linears.values()
    products, sizes = float(sum(K * N for K, N in shapes)), float(sum(K + N for K, N in shapes))
    # the linears, the moments of their inputs, and down's product
    moments = 3 * model.hidden**2 + model.queries**2 + model.neurons * model.hidden
    linears = {"N·K": products, "N + K": sizes}
    reading = {"N·K + n²": products + moments, "N + K": sizes}
    return {"read": reading, "differentiate": linears, "rest": linears}


# estimating


def fits_of(linears: list[Decomposition], seconds: list[float], blocks: list[dict]) -> dict[str, Fit]:
    works = [work_of(block_shape(b["hidden"])) for b in blocks]
    fits = {"decompose": fit([d.work for d in linears], seconds)}
    for step, per in (("rest", 1), ("read", ROWS * LENGTH), ("differentiate", ROWS * LENGTH)):
        fits[step] = fit([work[step] for work in works], [b[step] / per for b in blocks])
    return fits


def block_seconds(model: Model, fits: dict[str, Fit], tokens: int) -> dict[str, float]:
    """Estimate the steps of one block. The first of the `tokens` of calibration are differentiated."""
    seconds = {step: fits[step].predict(work) for step, work in work_of(model).items()}
    return {
        "read": tokens * seconds["read"],
        "differentiate": min(tokens, DIFFERENTIATED) * seconds["differentiate"],
        "decompose": sum(fits["decompose"].predict(d.work) for d in decompositions(model)),
        "rest": seconds["rest"],
    }


def estimate(model: Model, fits: dict[str, Fit]) -> dict[str, float]:
    """Return the hours of each step for all blocks, and the GB of the largest moment and of all moments."""
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


if __name__ == "__main__":
    typer.run(main)
