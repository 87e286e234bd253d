"""`python -m bench.page`: docs/performance.md, made of nothing but what bench/results holds."""

import json
from pathlib import Path

import typer

from bench.kernels import DECODE, DENSITY, PREFILL
from bench.models import KEEP, MODELS, cases
from bench.report import RESULTS, ROOT, read_csv, write

PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, str]
# (title of a column, column of the results)
COLUMNS = (
    ("threads", "threads"),
    ("µs", "us"),
    ("p20–p80", "p20"),
    ("GB/s", "GB/s"),
    ("% of stream", "% of stream"),
    ("× dense", "x dense"),
    ("× dense compiled", "x dense compiled"),
    ("× static low rank", "x static low rank"),
    ("× masked in torch", "x masked in torch"),
    ("error", "error"),
)
BASELINES = ("x dense", "x dense compiled", "x static low rank")
INTRODUCTION = """# Performance

*Written by `python -m bench.page` from the files in `bench/results`; every number is in one of them.*

`× dense` and its neighbours say how many times as fast as that baseline ours is, below 1 that it is slower.
Dense is torch's `F.linear`, eager or by `torch.compile`; static low rank is two of them at the cost of ours;
masked in torch computes the same with torch's own operations. GB/s counts the weight bytes that have to
be read, and `% of stream` compares it with the best streaming loop timed in the same rounds. Contenders take
turns over copies of random weights that are larger than the cache; medians. `error` is ‖y - exact‖ / ‖exact‖
against float64. Files of one processor's name may be of different machines: compare ratios within a file.
"""
COST = """### What compressing costs

Seconds on this machine: a linear decomposed (n the smaller of its sizes, m the larger); a block of a Llama
calibrated and compressed by the default method (hidden size given, in the proportions of Llama-2-7B).
"""
FITS = """decompose: of a linear; compress: of a block, sums over its linears; calibrate: of a block and a
token, which is n·m of every linear and n² of every second moment.
"""


def main() -> None:
    """Write the page."""
    write(PAGE, page(RESULTS))
    typer.echo(f"wrote {PAGE}")


def page(results: Path) -> str:
    parts = [INTRODUCTION]
    for path in sorted(results.glob("*.csv")):
        stamp, rows = read_csv(path)
        if "MB" in rows[0]:
            parts.append(card(path, stamp, rows))
        elif "case" in rows[0]:
            parts.append(processor(path, stamp, rows))
        else:
            parts.append(plain(path.stem, stamp, rows, list(rows[0])))
    parts += [scaling(path) for path in sorted(results.glob("scale-*.json"))]
    return "\n".join(parts)


def processor(path: Path, stamp: str, rows: list[Row]) -> str:
    parts = [f"## {path.stem}\n\n{stamp}.\n"]
    image = ROOT / "docs" / f"roofline-{path.stem}.png"
    if image.exists():
        parts.append(f"![every case under the roofline]({image.name})\n")
    for title, chosen in (
        ("One layer of Llama-2-7B, one to eight tokens", DECODE),
        ("The same at other densities", DENSITY),
        ("Many tokens", PREFILL),
    ):
        names = [case.name for case in chosen]
        parts.append(f"### {title}\n\n{table([(r['case'], r) for r in rows if r['case'] in names])}")
    named = [
        (f"{model}: {linear}", row)
        for model, shape in MODELS.items()
        for linear, case in cases(shape).items()
        for row in rows
        if row["case"] == case.name
    ]
    title = f"One token through the linears of known models, keep about {KEEP}, bfloat16"
    parts.append(f"### {title}\n\n{table(named)}")
    return "\n".join([*parts, losses(rows)])


def losses(rows: list[Row]) -> str:
    """Where a baseline is faster, the worst first."""
    lost = [(row, name) for row in rows for name in BASELINES if row.get(name) and float(row[name]) < 1]
    if not lost:
        return "### Where a baseline is faster\n\nNowhere among these cases.\n"
    lines = ["| case | threads | faster is | ours is × as fast |", "| --- | --- | --- | --- |"]
    for row, name in sorted(lost, key=lambda entry: float(entry[0][entry[1]])):
        lines.append(f"| {row['case']} | {row['threads']} | {name.removeprefix('x ')} | {row[name]} |")
    several = len({(row["case"], row["threads"]) for row, _ in lost})
    count = f"In {several} of {len(rows)} measurements some baseline is faster."
    return f"### Where a baseline is faster\n\n{count}\n\n" + "\n".join(lines) + "\n"


def table(entries: list[tuple[str, Row]]) -> str:
    """Columns that these results have, of COLUMNS."""
    if not entries:
        return "Not measured.\n"
    columns = [(title, name) for title, name in COLUMNS if any(row.get(name) for _, row in entries)]
    lines = ["| | " + " | ".join(title for title, _ in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for label, row in entries:
        cells = [
            f"{row['p20']}–{row['p80']}" if name == "p20" else row.get(name) or "" for _, name in columns
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def card(path: Path, stamp: str, rows: list[Row]) -> str:
    """A graphics card: one line a problem, ours by backend."""
    backends = [name.removesuffix(" x dense") for name in rows[0] if name.endswith(" x dense")]
    fields = ["op", "model", "density", "M", "dtype", "dense us"]
    fields += [f"{b} {what}" for b in backends for what in ("us", "% of copy", "x dense")]
    return plain(path.stem, f"{stamp}. Inside CUDA graphs", rows, fields)


def plain(title: str, stamp: str, rows: list[Row], fields: list[str]) -> str:
    """The columns as they are in the file."""
    lines = ["| " + " | ".join(fields) + " |", "| --- " * len(fields) + "|"]
    lines += ["| " + " | ".join(row.get(field) or "" for field in fields) + " |" for row in rows]
    return f"## {title}\n\n{stamp}.\n\n" + "\n".join(lines) + "\n"


def scaling(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    base = found["kernels"]["base"]
    shape = f"{base['K']} → {base['N']}, {base['R']} stored and {base['live']} live ranks, {base['M']} token"
    parts = [f"## How times grow: {path.stem}\n\n{found['conditions']}.\n"]
    if path.with_suffix(".png").exists():
        parts.append(f"![times and fits](../bench/results/{path.stem}.png)\n")
    parts.append(
        f"A rank adapter, {shape}, one of its numbers changed: µs ≈ constant + each · value (threads: each / "
        "threads). GB/s is at what rate the bytes that one more unit reads are read; a residual is "
        "(measured - fitted) / measured.\n"
    )
    lines = ["| changed | values | µs | constant | each | GB/s | largest residual |", "| --- " * 7 + "|"]
    for name, fitted in found["kernels"].items():
        if name != "base":
            lists = [", ".join(map(str, fitted[field])) for field in ("values", "us")]
            worst = max(map(abs, fitted["residuals"]))
            exact = " (as many coefficients as points)" if len(fitted["values"]) == 2 else ""
            cells = [
                name,
                *lists,
                fitted["constant"],
                fitted["each"],
                fitted.get("GB/s") or "",
                f"{worst:.0%}{exact}",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*parts, "\n".join(lines) + "\n", compression(found["compression"])])


def compression(found: dict) -> str:
    rows = [f"| {p['N']} × {p['K']} | {p['seconds']:g} |" for p in found["linears"]]
    blocks = [f"| {b['hidden']} | {b['calibrate']:g} | {b['compress']:g} |" for b in found["blocks"]]
    fits = []
    for name, fitted in found["fits"].items():
        terms = " + ".join(f"{value:.3g} · {feature}" for feature, value in fitted["coefficients"].items())
        fits.append(f"| {name} | {terms} | {', '.join(f'{r:+.0%}' for r in fitted['residuals'])} |")
    estimates = found["estimates"]
    fields = list(next(iter(estimates.values())))
    expected = [
        f"| {name} | " + " | ".join(str(e[f]) for f in fields) + " |" for name, e in estimates.items()
    ]
    assumed = (
        f"Extrapolated from these fits: {found['tokens']} tokens of calibration, on this machine; in GB the "
        "largest second moment, and all of them together. Beyond the largest block measured, hours of "
        "compressing are lower bounds: decompositions, which grow with n³, are not yet most of its time, and "
        "a coefficient below zero is the fit's.\n"
    )
    return "\n".join([
        COST,
        "| linear | s |", "| --- | --- |", *rows, "",
        "| block | calibrate s | compress s |", "| --- | --- | --- |", *blocks, "",
        "| seconds of | ≈ | residuals |", "| --- | --- | --- |", *fits, "",
        FITS,
        assumed,
        "| model | " + " | ".join(fields) + " |", "| --- " * (len(fields) + 1) + "|", *expected, "",
    ])  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
