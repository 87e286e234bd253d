"""The tables and lines that the commands print on stdout for people."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rana_kernels.checkpoint.model_card import describe_bits
from rana_kernels.compression.report import CompressReport
from rana_kernels.model.plan import AdapterSpec, Plan


def _out() -> Console:
    return Console(file=sys.stdout)


def show_compression(report: CompressReport, output: Path, stored: int) -> None:
    """Print the planned ranks, FLOPs and bytes. `stored` is the size of the directory in bytes."""
    console = _out()
    console.print(_rank_table(report.plan))
    blocks, whole = report.block_flops_reduction, report.model_flops_reduction
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    inside = [size / 1e6 for size in (report.block_bytes_before, report.block_bytes_after)]
    time = report.block_time_reduction
    faster = "" if time is None else f" ({time:.1%} less time expected)"
    console.print(
        f"{blocks:.1%} fewer FLOPs in the blocks' linears{faster}, {whole:.1%} fewer with lm_head. "
        f"{before:.1f} MB of weights became {after:.1f} MB (in these linears, {inside[0]:.1f} MB became "
        f"{inside[1]:.1f} MB); {stored / 1e6:.1f} MB written to {output}",
        highlight=False,
    )
    show_bits(report.plan, report.read_bytes_after)


def show_bits(plan: Plan, read_bytes: float) -> None:
    """Print the bits of the weights and the bytes that a token reads in the linears and lm_head."""
    _out().print(
        f"Bits of the weights: {describe_bits(plan)}. A token reads {read_bytes / 1e6:.1f} MB in the blocks' "
        "linears and lm_head",
        highlight=False,
    )


def show_evaluation(facts: dict[str, Any], plan: Plan) -> None:
    """Print the facts of `rana eval`: speed and perplexity, kept rows and their spread, and examples."""
    table = Table("", "perplexity", "tokens/s", "tokens/s, writing one by one")
    for name, numbers in (("compressed", facts["model"]), ("dense", facts["dense"])):
        if numbers is not None:
            rates = (numbers["tokens_per_second"], numbers["decode_tokens_per_second"])
            table.add_row(name, f"{numbers['perplexity']:.4f}", *(f"{rate:.1f}" for rate in rates))
    _out().print(table)
    if facts["divergence"] is not None:
        _out().print(
            f"Against the dense model's predictions: KL {facts['divergence']['kl']:.4f} nats a token, the "
            f"same first choice for {facts['divergence']['agreed']:.1%} of the tokens",
            highlight=False,
        )
    _out().print(_spread_table(facts["adapters"], plan))
    density = facts["density"]
    spread = ", ".join(f"{name} {value:.3f}" for name, value in density["tokens"].items())
    _out().print(
        f"Cost of the blocks' linears, as a fraction of the dense cost: {density['measured']:.3f} measured, "
        f"{density['planned']:.3f} planned; over tokens {spread}",
        highlight=False,
    )
    show_bits(plan, facts["read_bytes"])
    _out().print(_example_table("Tokens that keep most", facts["cost_most"]))
    if "lose_most" in facts:
        _out().print(_example_table("Predictions that lose most", facts["lose_most"]))


def _spread_table(adapters: list[dict[str, Any]], plan: Plan) -> Table:
    """Return the table of the rows that each adapter keeps: means, planned and measured, and quantiles."""
    columns = ("stored", "planned", "mean", "p5", "median", "p95", "max")
    table = Table("layer", "", *columns, title="Rows kept a token", title_justify="left")
    for entry in adapters:
        adapter = plan.adapter_of(entry["names"][0])
        assert adapter is not None, "the entries are of the plan's adapters"
        shown = {"stored": entry["rank"], "mean": entry["live"], **entry}
        table.add_row(*_layer_and_linears(adapter), *(f"{shown[column]:.0f}" for column in columns))
    return table


def _example_table(title: str, examples: list[dict[str, Any]]) -> Table:
    table = Table("cost", "loss", "dense", "after", "next", title=title, title_justify="left")
    for example in examples:
        dense = "" if example["dense_loss"] is None else f"{example['dense_loss']:.2f}"
        words = (escape(repr(example[key])) for key in ("text", "next"))
        table.add_row(f"{example['cost_ratio']:.3f}", f"{example['loss']:.2f}", dense, *words)
    return table


def show_tuning(choices: dict[str, Any], path: Path) -> None:
    """Print the choices of `rana tune`, {problem: (configuration, its µs, µs of the rule's)}."""
    table = Table("problem", "µs", "µs by the rule", "configuration", title=f"written to {path}")
    for key, (configuration, best, rule) in choices.items():
        table.add_row(key, f"{best:.1f}", f"{rule:.1f}", str(configuration))
    _out().print(table)


def _rank_table(plan: Plan) -> Table:
    """Return the table of kept and stored rows, with one line for each layer."""
    layers: dict[str, dict[str, str]] = {}
    for adapter in plan.all_adapters:
        layer, column = _layer_and_linears(adapter)
        shown = "dense" if adapter.kind == "dense" else f"{adapter.live:.0f}/{adapter.rank}"
        shown += f" in {adapter.bits}" if len(plan.bits) > 1 else ""
        layers.setdefault(layer, {})[column] = shown
    columns = list(dict.fromkeys(column for cells in layers.values() for column in cells))
    title = "Rows kept of rows stored, mean over tokens" + (", and bits" if len(plan.bits) > 1 else "")
    table = Table("layer", *columns, title=title, title_justify="left")
    for layer, cells in layers.items():
        table.add_row(layer, *(cells.get(column, "") for column in columns))
    return table


def _layer_and_linears(adapter: AdapterSpec) -> tuple[str, str]:
    """Return the layer and the linears of an adapter as a table shows them: "3" and "q k v"."""
    layer = next((part for part in adapter.names[0].split(".") if part.isdigit()), "")
    return layer, " ".join(name.rpartition(".")[2].removesuffix("_proj") for name in adapter.names)
