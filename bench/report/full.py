"""Every number of each file in bench/results, as tables in a Markdown page beside that file."""

from pathlib import Path

from bench.report.growth import compression, scaling
from bench.report.results import columns, read_csv
from bench.report.tables import table

Row = dict[str, str]
BASELINES = ("x dense", "x dense compiled", "x dense packed", "x static low rank", "x static packed")
WRITTEN = "*Written by `python -m bench.report`. How to read it: [performance](../../docs/performance.md).*\n"


def pages(results: Path) -> dict[Path, str]:
    """Return the text of each page by its path."""
    found = {}
    for pattern, show in (("*.csv", _page), ("scale-*.json", scaling), ("cost-*.json", compression)):
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
