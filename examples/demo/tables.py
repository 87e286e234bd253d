"""The tables of the report, as text. The terminal and the page show the same ones."""

from dataclasses import dataclass

from rich.table import Table as RichTable

from bench.report.tables import terminal_table
from examples.demo.results import DecodeStep, InBits, Quality, Variant

NAMES = {"global": "RaNA, one budget", "paper": "RaNA as published", "static": "static low rank"}


@dataclass
class Table:
    """A table whose first column is a name, and whose other columns hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __rich__(self) -> RichTable:
        return terminal_table(self.title, self.columns, self.rows)


def quality_table(quality: Quality) -> Table:
    dense = ("dense", "1.00", f"{quality.perplexity:.2f}", "", "", "", f"{quality.megabytes:.1f}")
    return Table(
        f"Perplexity on {quality.evaluation_tokens:,} tokens of held-out text",
        ("model", "cost", "perplexity", "over dense", "live ranks", "live neurons", "MB"),
        [dense, *(_quality_row(variant) for variant in quality.variants)],
    )


def _quality_row(variant: Variant) -> tuple[str, ...]:
    return (
        NAMES[variant.method],
        f"{variant.cost_ratio:.2f}",
        f"{variant.perplexity:.2f}",
        f"{variant.over_dense:+.1%}",
        _live(variant, "rank"),
        _live(variant, "neuron"),
        f"{variant.megabytes:.1f}",
    )


def _live(variant: Variant, kind: str) -> str:
    """Return the means over the adapters of that kind."""
    found = [adapter for adapter in variant.adapters if adapter.kind == kind]
    if not found:
        return ""
    live, stored = sum(a.live for a in found), sum(a.rank for a in found)
    return f"{live / len(found):.0f} of {stored / len(found):.0f}"


def bits_table(models: list[InBits]) -> Table:
    return Table(
        "Bits: the linears and lm_head, and one text",
        ("model", "bits", "perplexity", "over dense", "MB stored", "MB read a token", "tokens/s"),
        [_bits_row(model) for model in models],
    )


def _bits_row(model: InBits) -> tuple[str, ...]:
    dense = model.method == "dense"
    return (
        "dense" if dense else NAMES[model.method],
        str(model.bits),
        f"{model.perplexity:.2f}",
        "" if dense else f"{model.over_dense:+.1%}",
        f"{model.megabytes:.2f}",
        f"{model.read_megabytes:.2f}",
        f"{model.tokens_per_second:.0f}",
    )


def decode_table(steps: list[DecodeStep]) -> Table:
    return Table(
        "One decode step of the linears of one block (bfloat16, one token, random weights)",
        ("block", "threads", "cost", "dense µs", "RaNA µs", "speed-up", "dense GB/s", "RaNA GB/s"),
        [_decode_row(step) for step in steps],
    )


def _decode_row(step: DecodeStep) -> tuple[str, ...]:
    return (
        step.block,
        str(step.threads),
        f"{step.cost_ratio:.2f}",
        f"{step.dense.median:,.0f}",
        f"{step.rana.median:,.0f}",
        f"{step.speedup:.2f}×",
        f"{step.dense.gbs:.1f}",
        f"{step.rana.gbs:.1f}",
    )
