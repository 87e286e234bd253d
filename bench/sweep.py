"""How the time of a rank adapter grows with each of its sizes, with tokens and with threads."""

from dataclasses import asdict, replace
from typing import Any

import torch

from bench.fits import fit
from bench.linears import Lowrank
from bench.timing import interleave

BASE = Lowrank(4096, 11008, 2464, 1377, 1, "bf16")
AXES: dict[str, list[int]] = {
    "N": [1024, 2048, 4096, 8192, 11008, 16384],
    "K": [512, 1024, 2048, 4096, 8192, 11008],
    "R": [1536, 2048, 2464, 3072, 4096],
    "live": [123, 616, 1232, 1848, 2464],
    "M": [1, 2, 4, 8, 16, 32, 64, 128],
}


def sweep(base: Lowrank, axes: dict[str, list[int]], threads: list[int], rounds: int) -> dict[str, Any]:
    """By axis: its values, microseconds, the fit `constant + each · value` and its residuals.

    What one unit of an axis reads, over what it costs, is the `GB/s` at which the kernel grows. Threads are
    fitted as `constant + each / threads`.
    """
    found: dict[str, Any] = {"base": asdict(base)}
    for axis, values in axes.items():
        cases = {value: replace(base, **{axis: value}) for value in values}
        calls = {str(value): ours(case) for value, case in cases.items()}
        for count in threads:
            times = interleave(calls, count, rounds).times
            us = [times[str(value)].median for value in values]
            found[f"{axis}, {count} thread{'s' * (count > 1)}"] = fitted(
                values, us, [float(v) for v in values]
            ) | {"GB/s": marginal(base, axis, values, us)}
    call = {"ours": ours(base)}
    us = [interleave(call, count, rounds).times["ours"].median for count in threads]
    if len(threads) > 1:
        found["threads"] = fitted(threads, us, [1 / count for count in threads])
    return found


def ours(case: Lowrank) -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        return case.contenders().calls["rana"]


def fitted(values: list[int], us: list[float], feature: list[float]) -> dict[str, Any]:
    line = fit([{"constant": 1.0, "each": f} for f in feature], us)
    return {
        "values": values,
        "us": [round(t, 1) for t in us],
        **{name: float(f"{value:.4g}") for name, value in line.coefficients.items()},
        "residuals": [round(r, 3) for r in line.residuals],
    }


def marginal(base: Lowrank, axis: str, values: list[int], us: list[float]) -> float | None:
    """GB/s of what one more unit of the axis reads; None for tokens, which share what they read, and where
    more units take no more time."""
    weights = {"N": base.live, "K": base.R, "R": base.K, "live": base.N}.get(axis)
    if weights is None:
        return None
    each = fit([{"constant": 1.0, "each": float(v)} for v in values], us).coefficients["each"]
    return round(2 * weights / each / 1e3, 1) if each else None  # bfloat16
