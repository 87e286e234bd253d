"""Parts of docs/performance.md: how times grow with sizes, and what compressing costs."""

import json
from pathlib import Path

from bench.tables import table

SCALE = """A rank adapter, {shape}, one of its numbers changed: µs ≈ constant + each · value (threads:
each / threads). GB/s is at what rate the bytes that one more unit reads are read; a residual is (measured
- fitted) / measured.
"""
PIECES = """Seconds on this machine: a linear decomposed; a block of a Llama (hidden size given, in the
proportions of Llama-2-7B, float32) calibrated on {tokens} tokens and compressed by the default method.
*read*: calibration without gradients. *differentiate*: what gradients add. *decompose*: the eigenproblems
of all its linears. *rest*: errors of adapters on the sample, thresholds, modules.
"""
FITS = """decompose: of a linear, n the smaller of its sizes, and N·K² where it starts from the moment of
its inputs; rest: of a block, sums over its linears; read and differentiate: of a block and a token. No
coefficient may be below zero.
"""
CHECK = """A block of hidden size {hidden}, which no fit has seen, beside its estimate. The estimate
counts {counted} decompositions, every linear alone and with those that read the same input, and each
input's once more for the modules; the plan of this block took {taken}.
"""
ESTIMATES = """Hours on this machine by these fits, with {tokens} tokens of calibration, of which
{differentiated} are differentiated; in GB the largest second moment, and all of them together. Left out:
lm_head (a quarter more to differentiate for Llama-3.2-1B, a fiftieth for Llama-2-7B), loading and saving,
rows of more than {length} tokens, and that weights of 16 bits are read faster or slower than these. The
model and all its moments have to fit into memory.
"""


def scaling(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    base = found["kernels"]["base"]
    shape = f"{base['K']} → {base['N']}, {base['R']} stored and {base['live']} live ranks, {base['M']} token"
    parts = [f"## How times grow: {path.stem}\n\n{found['conditions']}.\n"]
    if path.with_suffix(".png").exists():
        parts.append(f"![times and fits](../bench/results/{path.stem}.png)\n")
    fits = {name: fitted for name, fitted in found["kernels"].items() if name != "base"}
    rows = [[name, *_line(fitted)] for name, fitted in fits.items()]
    titles = ["changed", "values", "µs", "constant", "each", "GB/s", "largest residual"]
    return "\n".join([*parts, SCALE.format(shape=shape), table(titles, rows)])


def _line(fitted: dict) -> list[object]:
    lists = [", ".join(map(str, fitted[field])) for field in ("values", "us")]
    exact = " (as many coefficients as points)" if len(fitted["values"]) == 2 else ""
    worst = f"{max(map(abs, fitted['residuals'])):.0%}{exact}"
    return [*lists, fitted["constant"], fitted["each"], fitted.get("GB/s") or "", worst]


def compression(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = list(found["check"]["estimated"])
    blocks = [[b["hidden"], *(f"{b[step]:g}" for step in steps)] for b in found["blocks"]]
    pieces = [[f"{p['N']} × {p['K']}", f"{p['seconds']:g}"] for p in found["linears"]]
    fits = [[name, *_terms(fitted)] for name, fitted in found["fits"].items()]
    estimates = found["estimates"]
    fields = list(next(iter(estimates.values())))
    return "\n".join([
        f"## What compressing costs: {path.stem}\n\n{found['conditions']}.\n",
        PIECES.format(tokens=found["sample"]),
        table(["linear", "s"], pieces),
        table(["block", *(f"{step} s" for step in steps)], blocks),
        table(["seconds of", "≈", "residuals"], fits),
        FITS,
        _check(found["check"], steps),
        ESTIMATES.format(**found["assumed"]),
        table(["model", *fields], [[name, *map(str, e.values())] for name, e in estimates.items()]),
    ])  # fmt: skip


def _terms(fitted: dict) -> list[str]:
    terms = [
        f"{value:.3g} · ({feature})" if " " in feature else f"{value:.3g} · {feature}"
        for feature, value in fitted["coefficients"].items()
    ]
    return [" + ".join(terms), ", ".join(f"{r:+.0%}" for r in fitted["residuals"])]


def _check(check: dict, steps: list[str]) -> str:
    rows = [[what, *(f"{check[what][s]:g}" for s in steps), f"{sum(check[what][s] for s in steps):.4g}"]
            for what in ("measured", "estimated")]  # fmt: skip
    words = CHECK.format(
        hidden=check["measured"]["hidden"],
        counted=check["counted"],
        taken=check["measured"]["decompositions"],
    )
    return "\n".join([words, table(["", *(f"{step} s" for step in steps), "all s"], rows)])
