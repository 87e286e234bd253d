"""Tables in Markdown, and tables on the terminal."""

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from bench.report.results import Row, columns


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown, with a newline at its end."""
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def show(console: Console, title: str, rows: list[Row], hidden: Collection[str] = ()) -> None:
    """Print all columns but the `hidden` ones; the first is aligned to the left."""
    shown = [name for name in columns(rows) if name not in hidden]
    console.print(terminal_table(title, shown, [[str(row.get(name, "")) for name in shown] for row in rows]))


def terminal_table(title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(title=title)
    for place, name in enumerate(titles):
        made.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        made.add_row(*row)
    return made
