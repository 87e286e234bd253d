"""Texts on disk, read piece by piece: plain text, JSON, JSON lines, and tables (CSV, TSV)."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

PIECE = 1 << 18  # characters: tokenizers take seconds and gigabytes for a text of a few megabytes
FIELD = "text"
KNOWN = "wanted UTF-8 text, .jsonl, .json, .csv or .tsv with `text`, or a .safetensors of input_ids"


def read_pieces(path: Path) -> Iterator[str]:
    """Give the text of a file in pieces of about `PIECE` characters, cut at the ends of lines.

    The documents of JSON and tables are the fields `text`, each followed by a blank line. Raises ValueError
    for a file that is something else: it is never read as prose.
    """
    read = _READERS.get(path.suffix.lower(), _plain)
    try:
        with path.open(encoding="utf-8-sig", newline="" if read in (_comma, _tab) else None) as file:
            yield from _in_pieces(read(file, path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}), {KNOWN}") from None


def _in_pieces(parts: Iterable[str]) -> Iterator[str]:
    held = ""
    for part in parts:
        held += part
        while len(held) >= PIECE:
            place = _cut(held)
            yield held[:place]
            held = held[place:]
    if held:
        yield held


def _cut(text: str) -> int:
    """Return where to cut off a piece: after its last line, else before its last word."""
    line, space = text.rfind("\n", 0, PIECE) + 1, text.rfind(" ", 1, PIECE)
    return line or (space if space > 0 else PIECE)


def _plain(file: TextIO, path: Path) -> Iterator[str]:
    part = file.read(PIECE)
    first = _json_of(part.lstrip().partition("\n")[0])
    if isinstance(first, dict) and first:
        raise ValueError(f"{path} holds JSON lines, and its name says text: call it .jsonl")
    while part:
        yield part
        part = file.read(PIECE)


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _document(_json_of(line), f"{path}: line {number}")


def _whole(file: TextIO, path: Path) -> Iterator[str]:
    """Read a list of documents, or one; and JSON lines, which often have the name .json."""
    found = _json_of(file.read())
    if found is None:
        file.seek(0)
        yield from _lines(file, path)
        return
    for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
        yield _document(entry, f"{path}: entry {number}")


def _document(entry: object, where: str) -> str:
    text = entry.get(FIELD) if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        has = f"the fields {', '.join(entry)[:200]}" if isinstance(entry, dict) else "no object of JSON"
        raise ValueError(f"{where} has {has}, wanted a string in the field `{FIELD}`")
    return f"{text}\n\n"


def _table(file: TextIO, path: Path, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 131,072 characters of the default
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
        if FIELD not in (rows.fieldnames or ()):
            has = ", ".join(rows.fieldnames or ["nothing"])[:200]
            raise ValueError(f"{path} has the columns {has}, wanted a column `{FIELD}` in its first line")
        for row in rows:
            yield f"{row[FIELD] or ''}\n\n"
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num} is no line of a table: {error}") from None


def _comma(file: TextIO, path: Path) -> Iterator[str]:
    return _table(file, path, ",")


def _tab(file: TextIO, path: Path) -> Iterator[str]:
    return _table(file, path, "\t")


_READERS: dict[str, Callable[[TextIO, Path], Iterator[str]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _whole,
    ".csv": _comma,
    ".tsv": _tab,
}
