"""`python -m bench.scale`: how the time of a rank adapter grows with sizes, tokens and threads."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.kernels.layers import Lowrank
from bench.kernels.timing import interleave, thread_counts
from bench.report.fits import fit
from bench.report.plots import draw_scale
from bench.report.results import RESULTS, conditions, processor, write_json

BASE = Lowrank(4096, 11008, 2464, 1377, 1, "bf16")
AXES: dict[str, list[int]] = {
    "N": [1024, 2048, 4096, 8192, 11008, 16384],
    "K": [512, 1024, 2048, 4096, 8192, 11008],
    "R": [1536, 2048, 2464, 3072, 4096],
    "live": [123, 616, 1232, 1848, 2464],
    "M": [1, 2, 4, 8, 16, 32, 64, 128],
}


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a point.")] = 15,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON, with a plot beside it; default bench/results/scale-<processor>.json."),
    ] = None,
) -> None:
    """Time a rank adapter along each of its sizes, with tokens and with threads, and fit lines.

    Example:  python -m bench.scale
    """
    stamp = conditions()
    typer.echo(f"{stamp}\ntiming a linear along {', '.join(AXES)}")
    with torch.inference_mode():
        kernels = sweep(BASE, AXES, thread_counts(), rounds)
    path = output or RESULTS / f"scale-{processor()}.json"
    write_json(path, stamp, {"kernels": kernels})
    draw_scale(kernels, path.with_suffix(".png"), stamp)
    typer.echo(f"wrote {path} and {path.with_suffix('.png')}")


def sweep(base: Lowrank, axes: dict[str, list[int]], threads: list[int], rounds: int) -> dict[str, Any]:
    """Return for each axis its values, microseconds, the fit `constant + each · value` and its residuals.

    `GB/s` is the rate at which the bytes of one more unit of the axis are read. Threads are fitted as
    `constant + each / threads`.
    """
    found: dict[str, Any] = {"base": asdict(base)}
    for axis, values in axes.items():
        calls = {str(value): ours(replace(base, **{axis: value})) for value in values}
        for count in threads:
            us = medians(calls, count, rounds)
            line = fitted(values, us, [float(v) for v in values])
            name = f"{axis}, {count} thread{'s' * (count > 1)}"
            found[name] = line | {"GB/s": marginal(base, axis, line["each"])}
    if len(threads) > 1:
        call = {"ours": ours(base)}
        us = [medians(call, count, rounds)[0] for count in threads]
        found["threads"] = fitted(threads, us, [1 / count for count in threads])
    return found


def ours(case: Lowrank) -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        return case.contenders().calls["rana"]


def medians(calls: dict[str, Any], threads: int, rounds: int) -> list[float]:
    return [time.median for time in interleave(calls, threads, rounds).times.values()]


def fitted(values: list[int], us: list[float], feature: list[float]) -> dict[str, Any]:
    line = fit([{"constant": 1.0, "each": f} for f in feature], us)
    return {
        "values": values,
        "us": [round(t, 1) for t in us],
        **{name: float(f"{value:.4g}") for name, value in line.coefficients.items()},
        "residuals": line.rounded_residuals,
    }


def marginal(base: Lowrank, axis: str, each: float) -> float | None:
    """Return the GB/s at which the bytes of one more unit of the axis, which takes `each` µs, are read.

    None for tokens, which share what they read, and where more units take no more time.
    """
    weights = {"N": base.live, "K": base.R, "R": base.K, "live": base.N}.get(axis)
    return round(2 * weights / each / 1e3, 1) if weights and each else None  # bfloat16


if __name__ == "__main__":
    typer.run(main)
