"""docs/programs.md: whole programs beside one another, from the results of `bench.decode MODEL --rivals`."""

from pathlib import Path

from bench.report.results import ROOT, Row, read_csv
from bench.report.tables import table

PAGE = ROOT / "docs" / "programs.md"
FILES = "rivals-*.csv"
RANDOM = "random weights"  # in place of a perplexity
INTRODUCTION = """# Whole programs

Tokens a second of whole programs that write one text, by the wall clock, and milliseconds to the first
token after a prompt. transformers, llama.cpp and this package (by the step of `rana generate`) have the same
weights; those of a shape without a model are random, and masks keep random inputs at the cost that is given.
Cost is a share of what dense blocks have in their linears: of multiply-adds in 16 bits, of bytes in fewer.
llama.cpp is that of xllamacpp's wheel, which is compiled for AVX2. One compiled for a machine with AVX-512
would use that, and was not measured. Contenders of one width take turns. Cells: one thread / all threads.

`python -m bench.decode MODEL --rivals llama.cpp` measures it, and `python -m bench.report` writes this page.
"""


def page(results: Path) -> str:
    parts = [INTRODUCTION]
    for path in sorted(results.glob(FILES)):
        stamp, rows = read_csv(path)
        parts.append(f"## {rows[0]['model']}\n\n{stamp}.\n\n{_table(rows)}")
    return "\n".join(parts)


def _table(rows: list[Row]) -> str:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["prompt"])):
        name, bits, cost_ratio = row["contender"], row["bits"], row["cost_ratio"]
        found.setdefault((name, bits, cost_ratio, row["prompt"]), []).append(row)
    lines = [
        [*key, _cell(own, "first_token_ms", 0), _cell(own, "tokens_per_s", 1), _megabytes(own)]
        for key, own in found.items()
    ]
    titles = ["program", "bits", "cost", "prompt", "first token ms", "tokens/s", "MB read a token"]
    if rows[0]["perplexity"] != RANDOM:
        lines = [[*line, own[0]["perplexity"]] for line, own in zip(lines, found.values(), strict=True)]
        titles.append("perplexity")
    return table(tuple(titles), lines)


def _cell(rows: list[Row], column: str, digits: int) -> str:
    return " / ".join(f"{float(row[column]):.{digits}f}" for row in rows)


def _megabytes(rows: list[Row]) -> str:
    return f"{float(rows[0]['bytes_read_per_token']) / 1e6:.0f}"
