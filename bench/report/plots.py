"""Plots of speed: against cost, under a processor's roofline, and along the sizes of an adapter."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.kernels.cases import DENSITY
from bench.report import bits
from bench.report.results import read_csv

Rows = list[dict[str, str]]
# of the plots of bench.quality and of the demo
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
# dense layers that ours is compared with: column, how it is drawn, words
AGAINST = (
    ("x dense", "o-", "against torch's F.linear"),
    ("x dense packed", "s:", "against packed weights (torch.compile, freezing)"),
)


def draw(results: Path, folder: Path) -> Iterator[Path]:
    """Write speed-NAME.png, roofline-NAME.png and quantized-NAME.png into `folder`, and yield their paths."""
    for path in sorted(results.glob("*.csv")):
        stamp, rows = read_csv(path)
        if bits.is_of_kernels(rows):
            yield _save(bits.draw, rows, stamp, folder / f"{path.stem}.png")
        elif "peak GFLOP/s" in rows[0] and "case" in rows[0]:
            for plot in (speed, roofline):
                yield _save(plot, rows, stamp, folder / f"{plot.__name__}-{path.stem}.png")


def _save(plot: Callable[[Axes, Rows], None], rows: Rows, stamp: str, target: Path) -> Path:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    plot(axes, rows)
    axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(stamp, fontsize=5, color="0.4")
    figure.savefig(target, dpi=150)
    return target


def speed(axes: Axes, rows: Rows) -> None:
    """Draw the speed-up over dense against cost, beside the ideal of 1 / cost."""
    names = {case.name for case in DENSITY}
    chosen = sorted((r for r in rows if r["case"] in names), key=lambda r: float(r["cost_ratio"]))
    costs = sorted({float(row["cost_ratio"]) for row in chosen})
    axes.plot(costs, [1 / cost for cost in costs], "--", color="0.5", label="dense time × cost")
    for number, threads in enumerate(sorted({row["threads"] for row in chosen}, key=int)):
        line = [row for row in chosen if row["threads"] == threads]
        for column, style, words in AGAINST:
            points = [(float(row["cost_ratio"]), float(row[column])) for row in line if row.get(column)]
            if points:
                label = f"{words}, {threads} thread{'s' * (threads != '1')}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    axes.axhline(1, color="0.8", zorder=0)
    axes.set(xlabel="cost, dense = 1: (R·K + live·N) / (K·N)", ylabel="times as fast as dense")
    axes.set_title("One token through a 4096 → 11008 linear, bfloat16", loc="left")
    axes.set_ylim(bottom=0)


def roofline(axes: Axes, rows: Rows) -> None:
    """Draw GFLOP/s against FLOP a byte, at the most threads measured, under the limits of the machine."""
    most = max(rows, key=lambda row: int(row["threads"]))["threads"]
    for dtype, color in (("bf16", "C0"), ("fp32", "C1"), ("fp16", "C2")):
        chosen = [row for row in rows if row["threads"] == most and row["case"].endswith(dtype)]
        if not chosen:
            continue
        speeds = [float(row["GFLOP/s"]) for row in chosen]
        # both columns are of the same time, so their ratio is work a byte
        intensities = [s / float(row["GB/s"]) for s, row in zip(speeds, chosen, strict=True)]
        peak = float(chosen[0]["peak GFLOP/s"])
        stream = max(float(row["stream GB/s"]) for row in chosen)
        reach = [min(intensities) / 2, peak / stream, max(*intensities, 2 * peak / stream)]
        axes.plot(reach, [min(peak, stream * x) for x in reach], "-", color=color, lw=1)
        label = f"{dtype}; roof {stream:.0f} GB/s, {peak:.0f} GFLOP/s"
        axes.plot(intensities, speeds, ".", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of weights read", ylabel="GFLOP/s")
    axes.set_title(f"Every case under the roofline, {most} thread(s)", loc="left")


def draw_scale(kernels: dict[str, Any], path: Path, stamp: str) -> None:
    """Draw the times along every axis of `bench.scale`, and the lines fitted to them."""
    curves = {tuple(name.split(", ")): found for name, found in kernels.items() if ", " in name}
    names = sorted({axis for axis, _ in curves})
    figure = Figure(figsize=(3 * len(names), 3), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for (axis, threads), found in curves.items():
        ends = [min(found["values"]), max(found["values"])]
        (points,) = panels[axis].plot(found["values"], found["us"], "o", label=threads)
        line = [found["constant"] + found["each"] * value for value in ends]
        panels[axis].plot(ends, line, "-", lw=1, color=points.get_color())
    for axis, axes in panels.items():
        axes.set_xlabel(axis)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)
    panels[names[0]].set_ylabel("µs")
    figure.supxlabel(stamp, fontsize=6, color="0.4")
    figure.savefig(path, dpi=120)
