"""What the commands print for people: tables and lines on stdout."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rana_kernels.measure import CompressReport
from rana_kernels.plan import Adapter, Plan


def _out() -> Console:
    return Console(file=sys.stdout)


def show_compression(report: CompressReport, output: Path, stored: int) -> None:
    """Planned ranks, FLOPs and bytes; `stored` bytes are in the directory."""
    console = _out()
    console.print(_rank_table(report.plan, {}))
    blocks, whole = report.block_flops_reduction, report.model_flops_reduction
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    console.print(
        f"{blocks:.1%} fewer FLOPs in the blocks' linears, {whole:.1%} with lm_head. {before:.1f} MB of "
        f"weights became {after:.1f}; {stored / 1e6:.1f} MB written to {output}",
        highlight=False,
    )


def show_evaluation(
    found: dict[str, float], dense: dict[str, float] | None, plan: Plan, live: dict[str, float]
) -> None:
    """Speeds and perplexities, then kept rows: `live` has a measured mean for each adapter's first linear."""
    table = Table("", "perplexity", "tokens/s", "tokens/s, writing one by one")
    for name, numbers in (("compressed", found), ("dense", dense)):
        if numbers is not None:
            rates = (numbers["tokens_per_second"], numbers["decode_tokens_per_second"])
            table.add_row(name, f"{numbers['perplexity']:.4f}", *(f"{rate:.1f}" for rate in rates))
    _out().print(table)
    _out().print(_rank_table(plan, live))


def show_tuning(choices: dict[str, Any], path: Path) -> None:
    """{problem: (configuration, its µs, the rule's µs)}."""
    table = Table("problem", "µs", "µs by the rule", "configuration", title=f"written to {path}")
    for key, (configuration, best, rule) in choices.items():
        table.add_row(key, f"{best:.1f}", f"{rule:.1f}", str(configuration))
    _out().print(table)


def _rank_table(plan: Plan, live: dict[str, float]) -> Table:
    """Kept of stored rows: a line a layer. `live` has measured means; without one, the plan's is shown."""
    layers: dict[str, dict[str, str]] = {}
    for adapter in plan.adapters:
        layer, column = _place(adapter)
        kept = live.get(adapter.names[0], adapter.live)
        shown = "dense" if adapter.kind == "dense" else f"{kept:.0f}/{adapter.rank}"
        layers.setdefault(layer, {})[column] = shown
    columns = list(dict.fromkeys(column for cells in layers.values() for column in cells))
    table = Table("layer", *columns, title="Rows kept of rows stored, mean over tokens", title_justify="left")
    for layer, cells in layers.items():
        table.add_row(layer, *(cells.get(column, "") for column in columns))
    return table


def _place(adapter: Adapter) -> tuple[str, str]:
    """Its row and column in a table: "3" and "q k v"."""
    layer = next((part for part in adapter.names[0].split(".") if part.isdigit()), "")
    return layer, " ".join(name.rpartition(".")[2].removesuffix("_proj") for name in adapter.names)
