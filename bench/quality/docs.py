"""`python -m bench.quality.docs`: write the tables within docs/quality.md, from bench/results.

A table stands between `<!-- quality-NAME: TABLE -->` and `<!-- end -->`. The words around it are written by
hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

import typer

from bench.quality import tables
from bench.report.results import RESULTS, ROOT, write

PAGE = ROOT / "docs" / "quality.md"
MARKED = re.compile(r"(<!-- (quality-\w+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Data = dict[str, Any]


def main() -> None:
    """Write the tables of docs/quality.md again."""
    write(PAGE, filled(PAGE.read_text(encoding="utf-8"), RESULTS))
    typer.echo(f"wrote {PAGE}")


def filled(text: str, results: Path) -> str:
    """Return the page with its tables filled in. Raise ValueError for a table that does not exist."""

    def block(found: re.Match) -> str:
        start, name, table, end = found.groups()
        if table not in TABLES:
            raise ValueError(f"{name}: there is no table {table!r}, wanted one of {', '.join(TABLES)}")
        data = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return f"{start}{TABLES[table](data)}\n{end}"

    return MARKED.sub(block, text)


def _of(scope: str, show: Callable[[list[Data]], str]) -> Callable[[Data], str]:
    return lambda data: show([row for row in data["rows"].values() if row["scope"] == scope])


def _layers(part: str) -> Callable[[Data], str]:
    return lambda data: tables.layers(list(data["rows"].values()), part)


TABLES: dict[str, Callable[[Data], str]] = {
    "conditions": lambda data: fill("Measured on: " + "; ".join(data["conditions"]) + ".", 120),
    **{scope: _of(scope, tables.quality) for scope in tables.TITLES},
    **{f"{scope}, faithfulness": _of(scope, tables.faithfulness) for scope in tables.TITLES},
    "gaps": _of("both", tables.gaps),
    "recovered": _of("both", tables.recovered),
    "layers of qkv": _layers("qkv"),
    "layers of mlp": _layers("mlp"),
    "texts": lambda data: tables.texts(data["spread"]["global at 0.56"]),
}


if __name__ == "__main__":
    typer.run(main)
