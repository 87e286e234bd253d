"""Every number of each file in bench/results, as tables in a Markdown page beside that file."""

import json
from pathlib import Path
from typing import Any

from bench.kernels.quantized import RIVALS
from bench.report.results import columns, read_csv
from bench.report.tables import table

Row = dict[str, str]
BASELINES = (
    "x dense", "x dense compiled", "x dense packed", "x static low rank", "x static packed", "x rana bf16",
    *(f"x {name}" for name in RIVALS),
)  # fmt: skip
WRITTEN = "*Written by `python -m bench.report`. How to read it: [performance](../../docs/performance.md).*\n"
SCALE = """A rank adapter, {shape}, with one of its numbers changed: µs ≈ constant + each · value (for
threads:
each / threads). GB/s is the rate at which the bytes of one more unit are read. A residual is
(measured - fitted) / measured.
"""
PIECES = """Seconds on this machine: for decomposing one linear, and for one Llama block (of the given hidden
size, in the proportions of Llama-2-7B, float32) that is calibrated on {tokens} tokens and compressed by the
default method. *read* is calibration without gradients, and *differentiate* what gradients add. *decompose*
is the eigenproblems of all its linears, and *rest* the errors of adapters on the sample, thresholds and
modules.
"""
FITS = """*decompose* is for one linear: n is the smaller of its sizes, and N·K² counts if it starts from the
moment of its inputs. *rest* is for a block, with sums over its linears; *read* and *differentiate* are for a
block and a token. No coefficient may be negative.
"""
CHECK = """A block of hidden size {hidden}, which the fits have not seen, beside its estimate. The estimate
counts {counted} decompositions: every linear alone and jointly with those of the same input, and each input
once more for the modules. The plan of this block took {taken}.
"""
ESTIMATES = """Hours on this machine by these fits, with {tokens} tokens of calibration, of which
{differentiated} are differentiated; and GB of the largest second moment and of all moments. The estimates
leave out lm_head (a quarter more to differentiate for Llama-3.2-1B, a fiftieth for Llama-2-7B), loading and
saving, and rows of more than {length} tokens. They take weights of 16 bits to be read as fast as these. The
model and all its moments must fit into memory.
"""


def pages(results: Path) -> dict[Path, str]:
    """Return the text of each page by its path."""
    found = {}
    for pattern, show in (("*.csv", _page), ("scale-*.json", _scaling), ("cost-*.json", _compression)):
        for path in sorted(results.glob(pattern)):
            title, _, rest = show(path).partition("\n")
            found[path.with_suffix(".md")] = f"{title}\n\n{WRITTEN}{rest}"
    return found


def _page(path: Path) -> str:
    stamp, rows = read_csv(path)
    names = columns(rows)
    parts = [f"# {path.stem}\n\n{stamp}.\n"]
    parts += [losses(rows), "## Everything\n"] if "case" in names else []
    return "\n".join([*parts, table(names, [[row.get(name) or "" for name in names] for row in rows])])


def losses(rows: list[Row]) -> str:
    """List every case where a baseline is faster, the worst first."""
    lost = [(row, name) for row in rows for name in BASELINES if row.get(name) and float(row[name]) < 1]
    lost.sort(key=lambda entry: float(entry[0][entry[1]]))
    several = len({(row["case"], row["threads"]) for row, _ in lost})
    count = f"In {several} of {len(rows)} measurements some baseline is faster."
    found = [[row["case"], row["threads"], name.removeprefix("x "), row[name]] for row, name in lost]
    titles = ["case", "threads", "faster is", "ours is × as fast"]
    return f"## Where a baseline is faster\n\n{count}\n\n{table(titles, found)}"


def _scaling(path: Path) -> str:
    found = _json(path)
    base = found["kernels"]["base"]
    shape = f"{base['K']} → {base['N']}, {base['R']} stored and {base['live']} live ranks, {base['M']} token"
    parts = [f"# How times grow: {path.stem}\n\n{found['conditions']}.\n"]
    if path.with_suffix(".png").exists():
        parts.append(f"![times and fits]({path.stem}.png)\n")
    rows = [[name, *_line(fitted)] for name, fitted in found["kernels"].items() if name != "base"]
    titles = ["changed", "values", "µs", "constant", "each", "GB/s", "largest residual"]
    return "\n".join([*parts, SCALE.format(shape=shape), table(titles, rows)])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _line(fitted: dict) -> list[object]:
    lists = [", ".join(map(str, fitted[field])) for field in ("values", "us")]
    exact = " (as many coefficients as points)" if len(fitted["values"]) == 2 else ""
    worst = f"{max(map(abs, fitted['residuals'])):.0%}{exact}"
    return [*lists, fitted["constant"], fitted["each"], fitted.get("GB/s") or "", worst]


def _compression(path: Path) -> str:
    found = _json(path)
    steps = list(found["check"]["estimated"])
    blocks = [[b["hidden"], *(f"{b[step]:g}" for step in steps)] for b in found["blocks"]]
    pieces = [[f"{p['N']} × {p['K']}", f"{p['seconds']:g}"] for p in found["linears"]]
    estimates = found["estimates"]
    fields = list(next(iter(estimates.values())))
    return "\n".join([
        f"# What compressing costs: {path.stem}\n\n{found['conditions']}.\n",
        PIECES.format(tokens=found["sample"]),
        table(["linear", "s"], pieces),
        table(["block", *(f"{step} s" for step in steps)], blocks),
        table(["seconds of", "≈", "residuals"], [[n, *_terms(f)] for n, f in found["fits"].items()]),
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
    measured = check["measured"]
    words = CHECK.format(
        hidden=measured["hidden"], counted=check["counted"], taken=measured["decompositions"]
    )
    return "\n".join([words, table(["", *(f"{step} s" for step in steps), "all s"], rows)])
