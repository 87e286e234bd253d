"""The command: `python -m bench.report`."""

import json

import typer

from bench.quality import tables
from bench.report import full, page, programs
from bench.report.results import RESULTS, ROOT, write


def main() -> None:
    """Write performance.md, programs.md and plots under docs/, and tables for each file of results."""
    from bench.report.plots import draw  # needs matplotlib

    written = {page.PAGE: page.page(RESULTS), programs.PAGE: programs.page(RESULTS), **full.pages(RESULTS)}
    for path in RESULTS.glob("quality-*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        written[path.with_suffix(".md")] = tables.page(data, path.stem)
    for path, text in written.items():
        write(path, text)
    for path in (*written, *draw(RESULTS, ROOT / "docs")):
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
