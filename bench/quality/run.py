"""The order of a run: every contender at every budget in every scope, then the spread over tokens."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from torch import Tensor

from bench.quality import recovery, rounded
from bench.quality.contenders import CONTENDERS, EVALUATIONS, WHOLE
from bench.quality.measure import Row, fill, fit, kept_energy, measure
from bench.quality.spread import in_prose, spread
from bench.quality.store import Store
from bench.quality.subject import SCOPES, Candidate, Subject, some_rows
from bench.quality.tables import LAYER_BUDGET

LAYER_ROWS = 8  # rows of text on which layers are compared
SPREAD = (("global", 0.56), ("paper", 0.56), ("global", 0.35))


@dataclass(frozen=True)
class Settings:
    """Every method is measured at every budget.

    budgets           of multiply-adds
    reads             of bytes, for the contenders of `rounded.py`
    ablation_tokens   of the evaluation text, where only MLPs or only attention is compressed
    spread_tokens     of each kind of text, for the spread over tokens
    recovery_steps    of the training of each model; 0: no training
    """

    budgets: tuple[float, ...] = (0.70, 0.56, 0.45, 0.35, 0.25)
    reads: tuple[float, ...] = (0.53, 0.40, 0.28, 0.25, 0.22, 0.19)
    methods: tuple[str, ...] = (*CONTENDERS, *rounded.CONTENDERS)
    ablation_tokens: int = 16_384
    spread_tokens: int = 16_384
    recovery_steps: int = 25


def run(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Measure what the store does not have yet. Raise ValueError if its results have other settings."""
    store.settle("ablation_tokens", settings.ablation_tokens)
    store.settle("spread_tokens", settings.spread_tokens)
    store.settle("evaluations", EVALUATIONS)
    if settings.recovery_steps:
        recovery.check()
        store.settle("recovery", recovery.settings(subject, settings.recovery_steps))
    for scope in (*SCOPES, rounded.BYTES):
        part = scope in ("mlp", "attention")
        tokens = settings.ablation_tokens if part else subject.evaluation.numel()
        if tokens:
            text = some_rows(subject.evaluation, tokens)
            Comparison(subject, store, scope, settings, text, console).run()
    if subject.prose is not None and settings.spread_tokens:
        look_closer(subject, store, settings, console)


@dataclass(frozen=True)
class Comparison:
    """The rows of one scope, measured on `text`. Only whole models are recovered."""

    subject: Subject
    store: Store
    scope: str
    settings: Settings
    text: Tensor
    console: Console

    def run(self) -> None:
        for budget in self.settings.reads if self.scope == rounded.BYTES else self.settings.budgets:
            for method in self._methods:
                row = Row(self.scope, method, False, budget)
                candidate = None if self.store.has("rows", row.key) else self._measure(row, self._fitted)
                trained = replace(row, recovered=True)
                if self._recovers and not self.store.has("rows", trained.key):
                    self._measure(trained, partial(self._trained, candidate))

    @property
    def _methods(self) -> list[str]:
        own = [method for method in self.settings.methods if method in self._contenders]
        return [method for method in own if self.scope == "both" or method not in WHOLE]

    @property
    def _contenders(self) -> dict[str, Callable[[Subject, str, float], Candidate]]:
        return rounded.CONTENDERS if self.scope == rounded.BYTES else CONTENDERS

    @property
    def _recovers(self) -> bool:
        return self.scope == "both" and self.settings.recovery_steps > 0

    def _measure(self, row: Row, make: Callable[[Row], Candidate]) -> Candidate | None:
        """Make and measure the candidate of `row`. If its budget cannot be met, the row says why."""
        candidate = None
        with self.console.status(row.key):
            try:
                candidate = make(row)
                fill(row, candidate, self.subject, self.text, self._dense())
                if row.budget == LAYER_BUDGET:
                    some = some_rows(self.text, LAYER_ROWS * self.text.shape[1])
                    original = replace(self.subject, dense=candidate.dense)
                    row.layers = kept_energy(original, candidate.model, some)
            except ValueError as error:
                row.failed = str(error)
        self.console.print(_line(row), highlight=False)
        self.store.put("rows", row.key, asdict(row))
        return candidate

    def _dense(self) -> float:
        """Return the perplexity of the dense model."""
        if not self.store.has("dense", self.scope):
            found = measure(self.subject.dense, self.text)
            facts = {"perplexity": found.perplexity, "predictions": found.losses.numel()}
            self.store.put("dense", self.scope, facts)
        return self.store.section("dense")[self.scope]["perplexity"]

    def _fitted(self, row: Row) -> Candidate:
        """Return a candidate of the wanted cost."""
        first = None
        if row.method == "rankadaptor":  # a search takes long, and spends a budget as `global` does
            first = self._found(replace(row, method="global")).get("asked")
        candidate, row.asked = fit(partial(self._build, row), row.budget, self.text, first)
        return candidate

    def _trained(self, candidate: Candidate | None, row: Row) -> Candidate:
        """Train `candidate`, or one like it if that was of an earlier run."""
        before = self._found(replace(row, recovered=False))
        if before["failed"]:
            raise ValueError(before["failed"])
        row.asked = before["asked"]
        candidate = candidate or self._build(row, before["asked"])
        recovery.recover(candidate, self.subject, self.settings.recovery_steps)
        return candidate

    def _build(self, row: Row, cost_ratio: float) -> Candidate:
        return self._contenders[row.method](self.subject, row.scope, cost_ratio)

    def _found(self, row: Row) -> dict[str, Any]:
        return self.store.section("rows").get(row.key, {})


def look_closer(subject: Subject, store: Store, settings: Settings, console: Console) -> None:
    """Measure live rows token by token, and another kind of text."""
    other = in_prose(subject)
    for method, cost_ratio in SPREAD:
        key = f"{method} at {cost_ratio:.2f}"
        if method in settings.methods and not store.has("spread", key):
            with console.status(f"spread of {key}"):
                found = spread(subject, other, method, cost_ratio, settings.spread_tokens)
                store.put("spread", key, found)
            console.print(f"spread of {key}: done", highlight=False)


def _line(row: Row) -> str:
    if row.failed:
        return f"{row.key:32} {row.failed}"
    faithful = f"KL {row.kl:.4f}  same first choice {row.agreed:.1%}"
    return f"{row.key:32} cost {row.cost_ratio:.3f}  {faithful}  perplexity {row.over_dense:+.2%}"
