"""The order of things: every contender at every budget in every scope, then what the means hide."""

from dataclasses import asdict, dataclass, replace

from rich.console import Console
from torch import Tensor

from bench.quality.contenders import CONTENDERS, Candidate
from bench.quality.fit import fit
from bench.quality.layers import kept_energy
from bench.quality.measure import Row, fill, measure
from bench.quality.recovery import recover
from bench.quality.spread import in_prose, spread
from bench.quality.store import Store
from bench.quality.subject import SCOPES, Subject, some_rows

LAYER_ROWS = 8  # on which layers are compared
SPREAD = (("global", 0.56), ("paper", 0.56), ("global", 0.35))


@dataclass(frozen=True)
class Settings:
    """budgets and methods: each with each. Of the evaluation text, `ablation_tokens` are read where only
    MLPs or attention are compressed, and `spread_tokens` of each kind of text for the spread. 0
    `recovery_steps`: nothing is trained."""

    budgets: tuple[float, ...] = (0.70, 0.56, 0.45, 0.35, 0.25)
    methods: tuple[str, ...] = tuple(CONTENDERS)
    ablation_tokens: int = 16_384
    spread_tokens: int = 32_768
    recovery_steps: int = 0


def run(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Measure what the store does not have yet."""
    for scope in SCOPES:
        tokens = subject.evaluation.numel() if scope == "both" else settings.ablation_tokens
        compare(subject, store, scope, settings, some_rows(subject.evaluation, tokens), console)
    if subject.prose is not None:
        look_closer(subject, store, settings, console)


def compare(
    subject: Subject, store: Store, scope: str, settings: Settings, rows: Tensor, console: Console
) -> None:
    """The rows of one scope; whole models are recovered too, if at all."""
    kinds = (False, True) if scope == "both" and settings.recovery_steps else (False,)
    wanted = [Row(scope, m, r, b) for r in kinds for b in settings.budgets for m in settings.methods]
    wanted = [row for row in wanted if not store.has("rows", row.key)]
    if wanted and not store.has("dense", scope):
        found = measure(subject.dense, rows)
        store.put("dense", scope, {"perplexity": found.perplexity, "predictions": found.losses.numel()})
    for row in wanted:
        with console.status(row.key):
            try:
                candidate = _candidate(subject, store, row, rows, settings.recovery_steps)
                fill(row, candidate, rows, store.section("dense")[scope]["perplexity"])
                some = some_rows(rows, LAYER_ROWS * rows.shape[1])
                row.layers = kept_energy(subject, candidate.model, some)
            except ValueError as error:  # a budget that the method cannot meet is a result too
                row.failed = str(error)
        console.print(_line(row), highlight=False)
        store.put("rows", row.key, asdict(row))


def _candidate(subject: Subject, store: Store, row: Row, rows: Tensor, steps: int) -> Candidate:
    """Of the cost that was wanted, and then trained, if `row` is of a recovered one."""

    def build(keep: float) -> Candidate:
        return CONTENDERS[row.method](subject, row.scope, keep)

    if not row.recovered:
        candidate, row.asked = fit(build, row.budget, rows)
        return candidate
    before = store.section("rows")[replace(row, recovered=False).key]
    if before["failed"]:
        raise ValueError(before["failed"])
    row.asked = before["asked"]
    candidate = build(row.asked)
    recover(candidate, subject, row.scope, steps)
    return candidate


def look_closer(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Kept rows over tokens, and text of another kind."""
    other = in_prose(subject)
    for method, keep in SPREAD:
        key = f"{method} at {keep:.2f}"
        if method in settings.methods and not store.has("spread", key):
            with console.status(f"spread of {key}"):
                store.put("spread", key, spread(subject, other, method, keep, settings.spread_tokens))
            console.print(f"spread of {key}: done", highlight=False)


def _line(row: Row) -> str:
    if row.failed:
        return f"{row.key:32} {row.failed}"
    return f"{row.key:32} cost {row.keep:.3f}  perplexity {row.perplexity:.3f}  {row.over_dense:+.2%}"
