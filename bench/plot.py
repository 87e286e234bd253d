"""`python -m bench.plot`: the plots under docs/, from the results that `python -m bench` wrote."""

from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from bench.kernels import DENSITY
from bench.report import RESULTS, ROOT, processor, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = ROOT / "docs"
Rows = list[dict[str, str]]
# dense layers that ours is compared with: column, how it is drawn, words
AGAINST = (
    ("x dense", "o-", "against torch's F.linear"),
    ("x dense packed", "s:", "against packed weights (torch.compile, freezing)"),
)


def main(
    results: Annotated[Path | None, typer.Option(help="CSV; default that of this processor.")] = None,
) -> None:
    """Draw speed-up against cost, and every measurement under the machine's roofline."""
    path = results or RESULTS / f"{processor()}.csv"
    stamp, rows = read_csv(path)
    for draw in (speed, roofline):
        target = DOCS / f"{draw.__name__}-{path.stem}.png"
        if draw is roofline and "peak GFLOP/s" not in rows[0]:
            typer.echo(f"{path} is of an earlier form, without the processor's peak: no roofline")
            continue
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw(axes, rows)
        axes.legend(frameon=False, fontsize=8)
        figure.supxlabel(stamp, fontsize=5, color="0.4")
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, dpi=150)
        typer.echo(f"wrote {target}")


def speed(axes: plt.Axes, rows: Rows) -> None:
    """Speed-up over dense against the cost that is kept, beside the ideal of 1 / cost."""
    names = {case.name for case in DENSITY}
    chosen = sorted((r for r in rows if r["case"] in names), key=lambda r: float(r["keep"]))
    costs = sorted({float(row["keep"]) for row in chosen})
    axes.plot(costs, [1 / cost for cost in costs], "--", color="0.5", label="dense time × cost")
    for number, threads in enumerate(sorted({row["threads"] for row in chosen}, key=int)):
        line = [row for row in chosen if row["threads"] == threads]
        for column, style, words in AGAINST:
            points = [(float(row["keep"]), float(row[column])) for row in line if row.get(column)]
            if points:
                label = f"{words}, {threads} thread{'s' * (threads != '1')}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    axes.axhline(1, color="0.8", zorder=0)
    axes.set_xlabel("cost kept: (R·K + live·N) / (K·N)")
    axes.set_ylabel("times as fast as dense")
    axes.set_title("One token through a 4096 → 11008 linear, bfloat16", loc="left")
    axes.set_ylim(bottom=0)


def roofline(axes: plt.Axes, rows: Rows) -> None:
    """GFLOP/s against FLOP a byte, at the most threads measured, under what the machine can do."""
    most = max(rows, key=lambda row: int(row["threads"]))["threads"]
    for dtype, color in (("bf16", "C0"), ("fp32", "C1"), ("fp16", "C2")):
        chosen = [row for row in rows if row["threads"] == most and row["case"].endswith(dtype)]
        if not chosen:
            continue
        speeds = [float(row["GFLOP/s"]) for row in chosen]
        # both columns are of the same time: what is left is work a byte
        intensities = [s / float(row["GB/s"]) for s, row in zip(speeds, chosen, strict=True)]
        peak = float(chosen[0]["peak GFLOP/s"])
        stream = max(float(row["stream GB/s"]) for row in chosen)
        reach = [min(intensities) / 2, peak / stream, max(*intensities, 2 * peak / stream)]
        axes.plot(reach, [min(peak, stream * x) for x in reach], "-", color=color, lw=1)
        axes.plot(
            intensities,
            speeds,
            ".",
            color=color,
            label=f"{dtype}; roof {stream:.0f} GB/s, {peak:.0f} GFLOP/s",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte of weights read")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Every case under the roofline, {most} thread(s)", loc="left")


if __name__ == "__main__":
    typer.run(main)
