"""What every benchmark says of its results: on which machine, with what, and in which form."""

import csv
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection
from datetime import date
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rana_kernels import backends
from rana_kernels.system.cpu import cpu_field, processor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, object]


def conditions() -> str:
    """Processor, threads, instruction set, what serves the ops, versions, date and revision."""
    served = ", ".join(sorted({s["cpu"] for s in backends.serving().values()}))
    return f"{machine()}, served by {served}, {versions()}, {date.today()}, revision {revision()}"


def machine() -> str:
    """The part of `conditions` that two runs must share for their times to be compared."""
    facts = [processor(), cpu_field("cpu family"), cpu_field("model"), cpu_field("stepping")]
    name = " ".join(part for part in (facts[0], "-".join(filter(None, facts[1:]))) if part)
    return f"{name}, {torch.get_num_threads()} threads, {backends.instruction_set()}"


def processor() -> str:
    """What the processor calls itself, as a file name."""
    return re.sub(r"\W+", "-", processor_name()).strip("-").lower()


def versions() -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}"


def revision() -> str:
    """Of the code: results and pages that are not committed yet do not make it another one.

    RANA_REVISION names that of a copy without its history.
    """
    if named := os.environ.get("RANA_REVISION"):
        return named
    if not shutil.which("git"):
        return "unknown"
    found = _git("describe", "--always").stdout.strip()
    pages = (":!bench/results", ":!docs", ":!*.md")
    changed = _git("diff", "--quiet", "HEAD", "--", ".", *pages).returncode != 0
    return f"{found}-dirty" if found and changed else found or "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def show(console: Console, title: str, rows: list[Row], hidden: Collection[str] = ()) -> None:
    """A table of all columns but the `hidden` ones, the first one to the left."""
    shown = [name for name in columns(rows) if name not in hidden]
    table = Table(title=title)
    for name in shown:
        first = name == shown[0]
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    console.print(table)


def write_csv(path: Path, stamp: str, rows: list[Row]) -> None:
    """The stamp on the first line, after a `#`."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, f"# {stamp}\n{text.getvalue()}")


def read_csv(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(stamp, rows) of a file that `write_csv` wrote."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if not first.startswith("# "):
        raise ValueError(f"{path} does not begin with the conditions of its run: it is not a result of ours")
    return first[2:], list(csv.DictReader(lines))


def write_json(path: Path, stamp: str, data: dict[str, object]) -> None:
    write(path, json.dumps({"conditions": stamp, **data}, indent=1, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)
