"""The plots, each a function of the results. Each is drawn once for light pages and once for dark ones.

Colours are by Okabe and Ito, made for colour-blind readers, and markers differ too.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.plots import STYLE
from examples.demo.results import Adapted, DensitySweep, Results, Variant
from examples.demo.tables import NAMES

LINEARS = {"q k v": "q, k, v (joint)", "gate": "gate", "up": "up", "down": "down"}
MARKERS = {"global": "D", "paper": "o", "static": "s"}


@dataclass(frozen=True)
class Theme:
    ink: str
    grid: str
    dense: str
    one_budget: str
    paper: str
    static: str
    layers: str  # a colour map, from which the layers get theirs in order
    layer_range: tuple[float, float]

    def of(self, method: str) -> str:
        return {"global": self.one_budget, "paper": self.paper, "static": self.static}[method]


LIGHT = Theme("#222222", "#d8d8d8", "#666666", "#009E73", "#0072B2", "#D55E00", "viridis", (0.0, 0.85))
DARK = Theme("#e8e8e8", "#444444", "#aaaaaa", "#4BD6A8", "#56B4E9", "#E69F00", "viridis", (0.3, 1.0))

Draw = Callable[[Results, Theme], Figure]


def render(draw: Draw, results: Results, theme: Theme) -> bytes:
    """Return the plot as a transparent PNG."""
    style = {
        **STYLE,
        "font.size": 10,
        "axes.titlesize": 10,
        "grid.color": theme.grid,
        "axes.edgecolor": theme.dense,
        **{key: theme.ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
    }
    with matplotlib.rc_context(style):
        png = io.BytesIO()
        draw(results, theme).savefig(
            png, format="png", dpi=200, transparent=True, metadata={"Software": None}
        )
    return png.getvalue()


def perplexity(results: Results, theme: Theme) -> Figure:
    figure = Figure(figsize=(5, 3.6))
    axes = figure.subplots()
    quality = results.quality
    axes.axhline(quality.perplexity, color=theme.dense, linestyle="--")
    axes.annotate(
        "dense", (0.01, quality.perplexity), xycoords=("axes fraction", "data"),
        xytext=(0, -4), textcoords="offset points", va="top", color=theme.dense,
    )  # fmt: skip
    for method, variants in by_method(quality.variants):
        cost, found = [v.cost_ratio for v in variants], [v.perplexity for v in variants]
        axes.plot(cost, found, MARKERS[method] + "-", color=theme.of(method), label=NAMES[method])
    axes.set(xlabel="cost of the block linears (fraction of dense)", ylabel="perplexity")
    axes.margins(y=0.12)
    axes.legend()
    return figure


def live_ranks(results: Results, theme: Theme) -> Figure:
    figure, panels = _four_panels(sharey=False)
    variant = shown_variant(results)
    for linear, axes in panels.items():
        adapters = _of(variant, linear)
        layers = [a.layer for a in adapters]
        axes.bar(layers, [a.rank for a in adapters], color=theme.grid, label="stored")
        axes.bar(layers, [a.live for a in adapters], color=theme.paper, width=0.5, label="live, mean")
        axes.set_xticks(layers)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("neurons" if linear == "down" else "ranks")
    _label_outer(panels, xlabel="layer")
    _legend(figure, panels["q k v"])
    return figure


def spectra(results: Results, theme: Theme) -> Figure:
    figure, panels = _four_panels(sharey=True)
    variant = shown_variant(results)
    colours, (low, high) = matplotlib.colormaps[theme.layers], theme.layer_range
    last = max(a.layer for a in variant.adapters)
    for linear, axes in panels.items():
        for a in _of(variant, linear):
            place = [i / (len(a.spectrum) - 1) for i in range(len(a.spectrum))]
            colour = colours(low + (high - low) * a.layer / max(1, last))
            axes.semilogy(place, a.spectrum, color=colour, linewidth=1.3, label=str(a.layer))
        axes.set_ylim(1e-7, 1)
    _label_outer(panels, xlabel="rank ÷ all ranks", ylabel="share of the energy")
    panels["down"].set_xlabel("neuron ÷ all neurons")
    _legend(figure, panels["q k v"], title="layer")
    return figure


def output_error(results: Results, theme: Theme) -> Figure:
    figure, panels = _four_panels(sharey=True)
    uniform = [v for v in results.quality.variants if v.method != "global"]
    for linear, axes in panels.items():
        for method, variants in by_method(uniform):
            cost = [v.cost_ratio for v in variants]
            error = [_mean(a.output_error for a in _of(v, linear)) for v in variants]
            axes.plot(cost, error, MARKERS[method] + "-", color=theme.of(method), label=NAMES[method])
    panels["q k v"].set_ylim(bottom=0)
    _label_outer(panels, xlabel="cost of the model", ylabel="‖y − ŷ‖ ÷ ‖y‖")
    _legend(figure, panels["q k v"])
    return figure


def density(results: Results, theme: Theme) -> Figure:
    sweeps = results.density
    figure = Figure(figsize=(5, 3.4))
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        _density_panel(axes, sweep, theme)
    # the panels share their axis, so one scale serves all
    panels[0].set_ylim(0, 1.08 * max(sweep.dense.median for sweep in sweeps))
    panels[0].set_ylabel("time (µs)")
    _legend(figure, panels[0])
    return figure


def _density_panel(axes: Axes, sweep: DensitySweep, theme: Theme) -> None:
    shares, dense = [p.density for p in sweep.points], sweep.dense.median
    axes.plot(shares, [dense] * len(shares), "--", color=theme.dense, label="dense")
    axes.plot(
        shares,
        [dense * p.cost_ratio for p in sweep.points],
        ":",
        color=theme.ink,
        label="ideal: dense × cost",
    )
    axes.plot(shares, [p.rana.median for p in sweep.points], "o-", color=theme.paper, label="RaNA")
    low, high = [p.rana.p20 for p in sweep.points], [p.rana.p80 for p in sweep.points]
    axes.fill_between(shares, low, high, color=theme.paper, alpha=0.25, linewidth=0)
    axes.set_xlabel("live share of the ranks")
    axes.set_title(f"{sweep.threads} thread" + "s" * (sweep.threads > 1))


FIGURES: dict[str, Draw] = {
    "perplexity": perplexity,
    "live_ranks": live_ranks,
    "spectra": spectra,
    "output_error": output_error,
    "density": density,
}


def by_method(variants: list[Variant]) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the variants of each method, by falling cost."""
    ordered = sorted(variants, key=lambda v: (v.method, -v.cost_ratio))
    return ((method, list(group)) for method, group in groupby(ordered, key=lambda v: v.method))


def shown_variant(results: Results) -> Variant:
    """Return the model of the per-layer plots: RaNA as published, which treats layers alike."""
    shown = results.texts.flops_reduction
    return next(v for v in results.quality.variants if (v.method, v.flops_reduction) == ("paper", shown))


def _of(variant: Variant, linear: str) -> list[Adapted]:
    return [a for a in variant.adapters if a.linear == linear]


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _four_panels(sharey: bool) -> tuple[Figure, dict[str, Axes]]:
    figure = Figure(figsize=(5, 4.8))
    panels = dict(zip(LINEARS, figure.subplots(2, 2, sharex=True, sharey=sharey).flat, strict=True))
    for linear, axes in panels.items():
        axes.set_title(LINEARS[linear])
    return figure, panels


def _label_outer(panels: dict[str, Axes], xlabel: str, ylabel: str | None = None) -> None:
    for linear in ("up", "down"):
        panels[linear].set_xlabel(xlabel)
    if ylabel is not None:
        for linear in ("q k v", "up"):
            panels[linear].set_ylabel(ylabel)


def _legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """Draw one legend for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title=title)
