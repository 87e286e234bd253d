"""The plots, made of nothing but the results. Colours are by Okabe and Ito, and markers differ too."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.quality.tables import LABELS, LAYER_BUDGET, TITLES, label, layer_rows, ordered
from bench.report.plots import STYLE

INK = (
    "#D55E00",
    "#E69F00",
    "#F0E442",
    "#CC79A7",
    "#56B4E9",
    "#0072B2",
    "#8C8C8C",
    "#009E73",
    "#4B0092",
    "#222222",
    "#8C8C8C",
    "#F0A070",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#0072B2",
    "#009E73",
    "#4B0092",
)
COLOURS = dict(zip(LABELS, INK, strict=True))
MARKERS = dict(zip(LABELS, "svd^<oXD*Pxsv^oD*P", strict=True))


def draw(data: dict[str, Any], path: Path) -> list[Path]:
    """Write `path`.png, and plots of layers and of live rows beside it. Return the files written."""
    figures = {
        path.with_suffix(".png"): cost,
        path.with_name(f"{path.stem}-layers.png"): layers,
        path.with_name(f"{path.stem}-rows.png"): live_rows,
    }
    written = []
    for place, plot in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = plot(data)
            if figure is not None:
                figure.supxlabel(data["conditions"][-1], fontsize=6, color="0.4")
                figure.savefig(place, dpi=130, metadata={"Software": None})
                written.append(place)
    return written


def cost(data: dict[str, Any]) -> Figure:
    """Draw KL, or perplexity over dense if there is no KL, against measured cost, one panel a scope."""
    rows = [row for row in ordered(data["rows"].values()) if not row["failed"]]
    scopes = [scope for scope in TITLES if any(row["scope"] == scope for row in rows)]
    shown = "kl" if all("kl" in row for row in rows) else "over_dense"
    figure = Figure(figsize=(3 + 4 * len(scopes), 4.6))
    panels = figure.subplots(1, len(scopes), sharey=True, squeeze=False)[0]
    for axes, scope in zip(panels, scopes, strict=True):
        _cost_panel(axes, [row for row in rows if row["scope"] == scope], shown)
        axes.set_title(TITLES[scope].split(" (")[0], loc="left", fontsize=9)
        unit = "bytes" if scope == "bytes" else "multiply-adds"
        axes.set_xlabel(f"{unit} measured, of the dense ones")
    panels[0].set_ylabel("KL from dense, nats a token" if shown == "kl" else "perplexity above dense")
    lines = {
        name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(lines.values()), list(lines), loc="outside right upper")
    return figure


def _cost_panel(axes: Axes, rows: list[dict[str, Any]], shown: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    for name, group in groups.items():
        method, recovered = group[0]["method"], group[0]["recovered"]
        points = sorted((row["cost_ratio"], row[shown]) for row in group)
        axes.plot(
            *zip(*points, strict=True), MARKERS[method] + ("--" if recovered else "-"),
            color=COLOURS[method], label=name, markersize=5, fillstyle="none" if recovered else "full",
        )  # fmt: skip
    if shown == "kl":
        axes.set_yscale("log")
        return
    # a model may have less perplexity than dense, so the axis must show negative values
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def layers(data: dict[str, Any]) -> Figure | None:
    """Draw the share of its output's energy that each layer loses, at one budget."""
    rows = layer_rows(data["rows"].values())
    if not rows:
        return None
    parts = list(rows[0]["layers"])
    figure = Figure(figsize=(1 + 4 * len(parts), 4))
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=True):
        for row in rows:
            method = row["method"]
            lost = [1 - share for share in row["layers"][part]]
            axes.semilogy(lost, MARKERS[method] + "-", color=COLOURS[method], label=label(row))
        axes.set_title(f"{part}, at a cost of {LAYER_BUDGET}", loc="left", fontsize=9)
        axes.set_xlabel("layer")
    panels[0].set_ylabel("share of the output's energy that is lost")
    panels[-1].legend()
    return figure


def live_rows(data: dict[str, Any]) -> Figure | None:
    """Draw the live rows of each adapter: planned mean, median, and the range of nine tokens of ten."""
    found = data.get("spread", {})
    if not found:
        return None
    figure = Figure(figsize=(9, 1 + 2.6 * len(found)))
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (key, entry) in zip(panels, found.items(), strict=True):
        _rows_panel(axes, entry["adapters"])
        axes.set_title(key, loc="left", fontsize=9)
    panels[0].legend(ncols=3)
    return figure


def _rows_panel(axes: Axes, adapters: list[dict[str, Any]]) -> None:
    places = range(len(adapters))
    share = {q: [a[q] / a["rank"] for a in adapters] for q in ("planned", "p5", "median", "p95")}
    axes.vlines(places, share["p5"], share["p95"], color=COLOURS["global"], label="p5 to p95 of tokens")
    axes.plot(places, share["median"], "D", color=COLOURS["global"], markersize=4, label="median token")
    axes.plot(places, share["planned"], "_", color="#222222", markersize=8, label="planned mean")
    axes.set(ylim=(0, 1), ylabel="live of stored rows")
    axes.set_xticks(places, [_short(a["names"]) for a in adapters], rotation=90, fontsize=6)


def _short(names: list[str]) -> str:
    layer = next((part for part in names[0].split(".") if part.isdigit()), "")
    return f"{layer} " + " ".join(name.rpartition(".")[2].removesuffix("_proj") for name in names)
