"""The order of the demo: load, compress and evaluate, write texts, time, write the report."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Plain

from bench.kernels.cases import MODELS, Model
from bench.report.results import write
from examples.demo.bits import measure_bits
from examples.demo.decode_step import sweep_density, time_block
from examples.demo.model import DemoModel, load_demo_model
from examples.demo.page import page
from examples.demo.quality import Compressed, measure_quality, subject_of
from examples.demo.results import DecodeStep, DensitySweep, Results, Texts, provenance
from examples.demo.tables import NAMES, bits_table, decode_table, quality_table
from examples.demo.texts import PROMPT, reload, write_texts


@dataclass(frozen=True)
class Settings:
    """The settings of a run. The defaults are those of the demo.

    budgets          `flops_reduction` of each compression
    show             the budget to save, load, generate and time at
    evaluation_rows  rows of 512 tokens, the same for every model
    blocks           block shapes to time
    linear           a linear K -> N to time at several densities
    rounds           runs of each contender in a timing
    """

    model: Path
    output: Path
    budgets: tuple[float, ...] = (0.3, 0.44, 0.55, 0.65)
    show: float = 0.44
    evaluation_rows: int = 200
    blocks: dict[str, Model] = field(
        default_factory=lambda: {name: MODELS[name] for name in ("Llama-3.2-1B", "Llama-2-7B")}
    )
    linear: tuple[int, int] = MODELS["Llama-2-7B"].linears["up"]
    densities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    rounds: int = 25


def run(settings: Settings, console: Console) -> Results:
    """Run the demo and print results on the way. Write report.html, report.json and the compressed model."""
    started = time.monotonic()
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load_demo_model(settings.model)
    with console.status("") as status:
        subject = subject_of(model, settings.evaluation_rows)
        quality, compressed = measure_quality(subject, settings.budgets, status.update)
    console.print(quality_table(quality))
    with console.status("4 bits"):
        shown = compressed["global", settings.show]
        bits = measure_bits(subject, shown, quality.perplexity, settings.show)
    console.print(bits_table(bits))
    with console.status("saving, loading, generating"):
        texts = _texts(model, compressed, settings)
    console.print(_side_by_side(texts))
    with console.status("timing one decode step"):
        decode_steps, density = _timings(settings)
    console.print(decode_table(decode_steps))
    results = Results(provenance(), quality, bits, texts, decode_steps, density, time.monotonic() - started)
    write(settings.output / "report.json", json.dumps(asdict(results), indent=1, allow_nan=False))
    write(settings.output / "report.html", page(results))
    return results


def _texts(model: DemoModel, compressed: Compressed, settings: Settings) -> Texts:
    folder, show = settings.output / "model", settings.show
    models = {
        "dense": model.dense,
        NAMES["global"]: reload(compressed["global", show].model, folder, model.tokenizer),
        NAMES["static"]: compressed["static", show].model,
    }
    stored = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return Texts(PROMPT, show, stored, write_texts(models, model.tokenizer))


def _side_by_side(texts: Texts) -> Table:
    table = Table(title=f"After {texts.prompt!r}", title_justify="left", title_style="bold")
    for text in texts.texts:
        table.add_column(text.label, ratio=1, overflow="fold")
    table.add_row(*(Plain(text.continuation) for text in texts.texts))
    return table


def _timings(settings: Settings) -> tuple[list[DecodeStep], list[DensitySweep]]:
    cost_ratio, rounds = 1 - settings.show, settings.rounds
    blocks = settings.blocks.items()
    steps = [step for name, shape in blocks for step in time_block(name, shape, cost_ratio, rounds)]
    return steps, sweep_density(*settings.linear, cost_ratio, settings.densities, rounds)
