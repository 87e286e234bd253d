"""`python -m bench.plot`: the README's plot, from the results that `python -m bench` wrote."""

import csv
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from bench.__main__ import RESULTS, processor
from bench.kernels import DENSITY

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PLOT = Path(__file__).parent.parent / "docs" / "speed.png"


def main(
    results: Annotated[Path | None, typer.Option(help="CSV; default that of this processor.")] = None,
) -> None:
    """Draw speed-up over dense against the cost that is kept, beside the ideal of 1 / cost."""
    path = results or RESULTS / f"{processor()}.csv"
    with path.open() as file:
        conditions = file.readline().strip("# \n")
        rows = [row for row in csv.DictReader(file) if row["case"] in {case.name for case in DENSITY}]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    costs = sorted({float(row["keep"]) for row in rows})
    axes.plot(costs, [1 / cost for cost in costs], "--", color="0.5", label="dense time × cost")
    for threads, marker in (("1", "o"), ("2", "s")):
        points = sorted((float(r["keep"]), float(r["x dense"])) for r in rows if r["threads"] == threads)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=f"rana, {threads} thread(s)")
    axes.axhline(1, color="0.8", zorder=0)
    axes.set_xlabel("cost kept: (R·K + live·N) / (K·N)")
    axes.set_ylabel("times as fast as torch's F.linear")
    axes.set_title("One token through a 4096 → 11008 linear, bfloat16", loc="left")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.supxlabel(conditions, fontsize=6, color="0.4")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)
    typer.echo(f"wrote {PLOT}")


if __name__ == "__main__":
    typer.run(main)
