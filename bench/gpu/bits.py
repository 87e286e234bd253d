"""`python -m bench.gpu.bits`: the ops with weights of 8 and 4 bits, timed inside CUDA graphs, as a CSV.

Beside them are dense layers, which have no masks: cuBLAS's product with weights of 16 bits, and torch's own
product with weights of 4 bits. Everything is timed as `bench.gpu.ops` times it.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.gpu import ops
from bench.kernels.case import Case, Weights
from bench.kernels.cases import QUANTIZED_COST_RATIO, Linear, Model, in_bits
from bench.kernels.quantized import bytes_a_value, int4_for_card, int4_on_card
from bench.kernels.weights import copies, weight
from bench.report.results import Row, conditions, write_csv
from rana_kernels import backends
from rana_kernels.backends import use_backend

BITS = (8, 4)
GROUPS = (32, 128)  # of torch's product


def main(
    output: Annotated[Path, typer.Argument(help="CSV.")],
    model: Annotated[list[str], typer.Option(help="May be given several times.")],
    tokens: Annotated[list[int], typer.Option(help="Tokens in a call; may be given several times.")],
    red: Annotated[list[str] | None, typer.Option(help="backend:op that is not to be timed.")] = None,
) -> None:
    """Time the ops in bfloat16. It does not test them: `python -m bench.gpu` does that before."""
    measure([(name, M) for M in tokens for name in model], frozenset(red or ()), output)


@torch.inference_mode()
def measure(grid: list[tuple[str, int]], red: frozenset[str], output: Path) -> None:
    torch.manual_seed(0)
    copy, read = ops.bandwidths()
    limits = {"copy GB/s": copy, "read GB/s": read}
    rows: list[Row] = []
    for name, M in grid:
        for case in cases(ops.MODELS[name], M):
            problem = quantized(case, name, red)
            rows.append(ops.row(problem, limits) | {"bits": case.bits})
            write_csv(output, conditions("cuda"), rows)
            print(f"{case.bits} bits, {ops.line(rows[-1])}")


def cases(model: Model, M: int) -> Iterator[Case]:
    """Yield a dense linear, and the masked ops at one cost, in 8 and in 4 bits."""
    K, N = model.linears["up"]
    dense = [Linear(K, N, M, "bf16", bits) for bits in BITS]
    yield from (case for case in (*dense, *in_bits(model, QUANTIZED_COST_RATIO, M)) if case.bits in BITS)


def quantized(case: Case, model: str, red: frozenset[str]) -> ops.Problem:
    x, cold = case.inputs(ops.DEVICE), ops.CACHES * ops.cache_bytes()
    ours, exact = case.in_bits(case.adapter(x))
    weights = copies(lambda: tuple(t.clone() for t in ours), cold=cold)
    dense = copies(lambda: tuple(weight(*shape, like=x) for shape in case.shapes), cold=cold)
    contenders: ops.Contenders = {"dense": [partial(case.layer, x, *given) for given in dense]}
    contenders |= rivals(case, x, dense[0], cold)
    contenders |= {
        f"rana {backend}": [partial(served, backend, case, x, *given) for given in weights]
        for backend in ops.BACKENDS
        if f"{backend}:{case.op}" not in red and backends.installed(backend)
    }
    touched = bytes_a_value(case.bits or 16) * case.values_read(x, exact)
    return ops.Problem(case, model, round(case.cost_ratio, 3), touched, contenders)


def served(backend: str, case: Case, x: Tensor, *tensors: Tensor) -> Tensor:
    with use_backend(backend):
        return case.run_in_bits(x, *tensors)


def rivals(case: Case, x: Tensor, weights: Weights, cold: float) -> ops.Contenders:
    """Return the dense layer by torch's product with weights of 4 bits: for bfloat16, on a card."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return {}
    found: ops.Contenders = {}
    for group in GROUPS:
        parts = tuple(part for dense in weights for part in int4_for_card(dense, group))
        turns = copies(lambda parts=parts: tuple(t.clone() for t in parts), cold=cold)
        linear = partial(int4_on_card, group)
        found[f"torch int4 g{group}"] = [partial(case.layer, x, *given, linear=linear) for given in turns]
    return found


if __name__ == "__main__":
    typer.run(main)
