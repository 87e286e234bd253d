"""`python -m bench.cost`: what a compression takes, timed on blocks, and what follows for whole models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import rana_kernels as rana
from bench.estimates import (
    CALIBRATION,
    DIFFERENTIATED,
    Decomposition,
    block_seconds,
    decompositions,
    differentiating,
    estimate,
    reading,
    rest,
)
from bench.fits import Fit, fit
from bench.models import LARGE, MODELS, Model
from bench.report import RESULTS, conditions, processor, write_json
from rana_kernels.statistics import block as calibrated_block
from rana_kernels.statistics.decomposition import decompose
from rana_kernels.system.cpu import clock

LINEARS = [
    Decomposition(N, K, of_inputs=N >= K)
    for N, K in (
        (1024, 1024), (2752, 1024), (1024, 2752), (2048, 2048), (5504, 2048), (2048, 5504), (11008, 4096),
    )
]  # fmt: skip
BLOCKS = [512, 1024, 1536, 2048]  # hidden sizes; the rest in the proportions of Llama-2-7B
CHECKED = 3072  # of a block that no fit has seen
ESTIMATED = {**{name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-2-7B")}, **LARGE}
ROWS, LENGTH = 8, 512  # calibration of a measured block: as many tokens as a sample has
STEPS = ("read", "differentiate", "decompose", "rest")


def main(
    output: Annotated[
        Path | None, typer.Option(help="JSON; default bench/results/cost-<processor>.json.")
    ] = None,
) -> None:
    """Time decompositions, and calibration and compression of blocks; fit; estimate whole models.

    Example:  python -m bench.cost
    """
    stamp = conditions()
    typer.echo(f"{stamp}\ntiming decompositions, calibration and compression")
    path = output or RESULTS / f"cost-{processor()}.json"
    write_json(path, stamp, cost(LINEARS, BLOCKS, CHECKED))
    typer.echo(f"wrote {path}")


def cost(linears: list[Decomposition], hidden: list[int], checked: int) -> dict[str, Any]:
    """Measurements, fits, estimates, and one more block beside its estimate. Two sizes or more of each."""
    pieces = [round(seconds_of(linear), 4) for linear in linears]
    blocks = [block(size) for size in hidden]
    fits = fits_of(linears, pieces, blocks)
    found, shape = block(checked), block_shape(checked)
    expected = block_seconds(shape, fits, ROWS * LENGTH)
    return {
        "linears": [{"N": d.N, "K": d.K, "seconds": s} for d, s in zip(linears, pieces, strict=True)],
        "blocks": blocks,
        "fits": {
            name: {"coefficients": f.coefficients, "residuals": [round(r, 3) for r in f.residuals]}
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


def fits_of(linears: list[Decomposition], seconds: list[float], blocks: list[dict]) -> dict[str, Fit]:
    shapes = [block_shape(b["hidden"]) for b in blocks]
    tokens = ROWS * LENGTH
    return {
        "decompose": fit([d.work for d in linears], seconds),
        "rest": fit([rest(shape) for shape in shapes], [b["rest"] for b in blocks]),
        "read": fit([reading(shape) for shape in shapes], [b["read"] / tokens for b in blocks]),
        "differentiate": fit(
            [differentiating(shape) for shape in shapes], [b["differentiate"] / tokens for b in blocks]
        ),
    }


def seconds_of(linear: Decomposition) -> float:
    """To decompose it, from the moment that calibration keeps of it."""
    size = linear.K if linear.of_inputs else linear.N
    x = torch.randn(size, size, dtype=torch.float64)
    weight = torch.randn(linear.N, linear.K) * linear.K**-0.5
    moment = x @ x.T / size
    now = clock(torch.get_num_threads())
    begin = now()
    decompose(weight, moment)
    return now() - begin


def block_shape(hidden: int) -> Model:
    neurons = round(hidden * 11008 / 4096 / 16) * 16
    return Model(hidden, hidden, hidden, neurons, 1)


def block(hidden: int) -> dict[str, Any]:
    """Seconds of the steps of `rana.compress` on a Llama of one block, random, read by random tokens.

    Reading alone is a calibration without gradients; what one with them takes longer is differentiating.
    """
    torch.manual_seed(0)
    model, tokens = random_block(hidden), torch.randint(256, (ROWS, LENGTH))
    now = clock(torch.get_num_threads())
    begin = now()
    rana.calibrate(model, tokens.split(4), gradients=False, progress=False)
    read = now() - begin
    begin = now()
    stats = rana.calibrate(model, tokens.split(4), progress=False)
    differentiate = now() - begin - read
    begin = now()
    with timed_decompositions(now) as decomposed:
        rana.compress(model, stats=stats, flops_reduction=0.44, progress=False)
    compress = now() - begin
    seconds = (read, differentiate, sum(decomposed), compress - sum(decomposed))
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


@contextmanager
def timed_decompositions(now: Any) -> Iterator[list[float]]:
    """Seconds of every decomposition within the block."""
    seconds: list[float] = []

    def timed(*arguments: Any) -> Any:
        begin = now()
        factors = decompose(*arguments)
        seconds.append(now() - begin)
        return factors

    with patch.object(calibrated_block, "decompose", timed):
        yield seconds


if __name__ == "__main__":
    typer.run(main)
