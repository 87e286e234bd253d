"""The order of things: every contender at every budget in every scope, then what the means hide."""

from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from torch import Tensor

from bench.quality.contenders import CONTENDERS
from bench.quality.fit import fit
from bench.quality.layers import kept_energy
from bench.quality.measure import Row, fill, measure
from bench.quality.spread import in_prose, spread
from bench.quality.store import Store
from bench.quality.subject import SCOPES, Subject

LAYER_ROWS = 8  # on which layers are compared
SPREAD = (("global", 0.56), ("paper", 0.56), ("global", 0.35))


@dataclass(frozen=True)
class Settings:
    """budgets and methods: each with each. Of the evaluation text, `ablation_tokens` are read where only
    MLPs or attention are compressed, and `spread_tokens` of each kind of text for the spread."""

    budgets: tuple[float, ...] = (0.70, 0.56, 0.45, 0.35, 0.25)
    methods: tuple[str, ...] = tuple(CONTENDERS)
    ablation_tokens: int = 16_384
    spread_tokens: int = 32_768


def run(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Measure what the store does not have yet."""
    for scope in SCOPES:
        tokens = subject.evaluation.numel() if scope == "both" else settings.ablation_tokens
        compare(subject, store, scope, settings, _spread_out(subject.evaluation, tokens), console)
    if subject.prose is not None:
        look_closer(subject, store, settings, console)


def compare(
    subject: Subject, store: Store, scope: str, settings: Settings, rows: Tensor, console: Console
) -> None:
    """The rows of one scope."""
    wanted = [Row(scope, method, False, b) for b in settings.budgets for method in settings.methods]
    wanted = [row for row in wanted if not store.has("rows", row.key)]
    if wanted and not store.has("dense", scope):
        found = measure(subject.dense, rows)
        store.put("dense", scope, {"perplexity": found.perplexity, "predictions": found.losses.numel()})
    for row in wanted:
        with console.status(f"{scope}: {row.method} at {row.budget}"):
            evaluate(subject, row, rows, store.section("dense")[scope]["perplexity"])
        console.print(_line(row), highlight=False)
        store.put("rows", row.key, asdict(row))


def evaluate(subject: Subject, row: Row, rows: Tensor, dense: float) -> None:
    """Fill `row` in; a budget that the method cannot meet is a result too."""
    build = CONTENDERS[row.method]
    try:
        candidate, asked = fit(lambda keep: build(subject, row.scope, keep), row.budget, rows)
    except ValueError as error:
        row.failed = str(error)
        return
    fill(row, candidate, asked, rows, dense)
    row.layers = kept_energy(subject, candidate.model, _spread_out(rows, LAYER_ROWS * rows.shape[1]))


def look_closer(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Kept rows over tokens, and text of another kind."""
    other = in_prose(subject)
    for method, keep in SPREAD:
        key = f"{method} at {keep:.2f}"
        if method in settings.methods and not store.has("spread", key):
            with console.status(f"spread of {key}"):
                rows = max(1, settings.spread_tokens // subject.evaluation.shape[1])
                store.put("spread", key, spread(subject, other, method, keep, rows))
            console.print(f"spread of {key}: done", highlight=False)


def _spread_out(rows: Tensor, tokens: int) -> Tensor:
    """About so many tokens, in whole rows and at least one, spread over the text."""
    count = max(1, min(len(rows), tokens // rows.shape[1]))
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def _line(row: Row) -> str:
    where = f"{row.scope:9} {row.method:12} {row.budget:.2f}  "
    if row.failed:
        return where + row.failed
    return where + f"cost {row.keep:.3f}  perplexity {row.perplexity:.3f}  {row.over_dense:+.2%}"
