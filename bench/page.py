"""`python -m bench.page`: docs/performance.md, made of nothing but what bench/results holds."""

from pathlib import Path

import typer

from bench import growth, tokens
from bench.kernels import DECODE, DENSITY, PREFILL
from bench.models import KEEP, MODELS, cases
from bench.report import RESULTS, ROOT, read_csv, write
from bench.tables import table

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
    ("× dense packed", "x dense packed"),
    ("× static low rank", "x static low rank"),
    ("× static packed", "x static packed"),
    ("× masked in torch", "x masked in torch"),
    ("error", "error"),
)
BASELINES = ("x dense", "x dense compiled", "x dense packed", "x static low rank", "x static packed")
# of one device, by `bench.plot`
PLOTS = {"speed": "speed-up against the cost that is kept", "roofline": "every case under the roofline"}
INTRODUCTION = """# Performance

*Written by `python -m bench.page` from the files in `bench/results`; every number is in one of them.*

`× dense` and its neighbours say how many times as fast as that baseline ours is, below 1 that it is slower.
Dense is torch's `F.linear`, eager or by `torch.compile`; static low rank is two of them at the cost of
ours; *packed* are the same two with their weights in oneDNN's own layout, into which `torch.compile` brings
those of a model where its option `freezing` is on; masked in torch computes the same with torch's own
operations. GB/s counts the weight bytes that have to be read, and `% of stream` compares it with the best
streaming loop timed in the same rounds. Contenders take turns over copies of random weights that are larger
than the cache; medians. `error` is ‖y - exact‖ / ‖exact‖ against float64. Files of one processor's name may
be of different machines: compare ratios within a file.
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
        elif "contender" in rows[0]:
            parts += [plain(path.stem, stamp, rows, list(rows[0])), tokens.models(rows)]
        else:
            parts.append(plain(path.stem, stamp, rows, list(rows[0])))
    parts += [growth.scaling(path) for path in sorted(results.glob("scale-*.json"))]
    parts += [growth.compression(path) for path in sorted(results.glob("cost-*.json"))]
    return "\n".join(parts)


def processor(path: Path, stamp: str, rows: list[Row]) -> str:
    parts = [f"## {path.stem}\n\n{stamp}.\n"]
    for plot, words in PLOTS.items():
        image = ROOT / "docs" / f"{plot}-{path.stem}.png"
        if image.exists():
            parts.append(f"![{words}]({image.name})\n")
    for title, chosen in (
        ("One layer of Llama-2-7B, one to eight tokens", DECODE),
        ("The same at other densities", DENSITY),
        ("Many tokens", PREFILL),
    ):
        names = [case.name for case in chosen]
        parts.append(f"### {title}\n\n{timings([(r['case'], r) for r in rows if r['case'] in names])}")
    named = [
        (f"{model}: {linear}", row)
        for model, shape in MODELS.items()
        for linear, case in cases(shape).items()
        for row in rows
        if row["case"] == case.name
    ]
    title = f"One token through the linears of known models, keep about {KEEP}, bfloat16"
    parts.append(f"### {title}\n\n{timings(named)}")
    return "\n".join([*parts, tokens.linear(rows), losses(rows)])


def losses(rows: list[Row]) -> str:
    """Where a baseline is faster, the worst first."""
    lost = [(row, name) for row in rows for name in BASELINES if row.get(name) and float(row[name]) < 1]
    if not lost:
        return "### Where a baseline is faster\n\nNowhere among these cases.\n"
    lost.sort(key=lambda entry: float(entry[0][entry[1]]))
    several = len({(row["case"], row["threads"]) for row, _ in lost})
    count = f"In {several} of {len(rows)} measurements some baseline is faster."
    found = [[row["case"], row["threads"], name.removeprefix("x "), row[name]] for row, name in lost]
    titles = ["case", "threads", "faster is", "ours is × as fast"]
    return f"### Where a baseline is faster\n\n{count}\n\n{table(titles, found)}"


def timings(entries: list[tuple[str, Row]]) -> str:
    """Columns that these results have, of COLUMNS."""
    if not entries:
        return "Not measured.\n"
    columns = [(title, name) for title, name in COLUMNS if any(row.get(name) for _, row in entries)]
    return table(
        ["", *(title for title, _ in columns)],
        [[label, *(_cell(row, name) for _, name in columns)] for label, row in entries],
    )


def _cell(row: Row, name: str) -> str:
    return f"{row['p20']}–{row['p80']}" if name == "p20" else row.get(name) or ""


def card(path: Path, stamp: str, rows: list[Row]) -> str:
    """A graphics card: one line a problem, ours by backend."""
    backends = [name.removesuffix(" x dense") for name in rows[0] if name.endswith(" x dense")]
    fields = ["op", "model", "density", "M", "dtype", "dense us", "static us", "masked in torch us"]
    fields += [f"{b} {what}" for b in backends for what in ("us", "% of copy", "x dense")]
    return plain(path.stem, f"{stamp}. Inside CUDA graphs", rows, fields)


def plain(title: str, stamp: str, rows: list[Row], fields: list[str]) -> str:
    """The columns as they are in the file."""
    return f"## {title}\n\n{stamp}.\n\n{table(fields, [[row.get(f) or '' for f in fields] for row in rows])}"


if __name__ == "__main__":
    typer.run(main)
