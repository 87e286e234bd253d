"""`python -m bench.scale`: how the time of an adapter grows with each of its sizes."""

from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer

from bench.report import RESULTS, conditions, processor, write_json
from bench.sweep import AXES, BASE, sweep
from bench.timing import thread_counts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a point.")] = 15,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON; default bench/results/scale-<processor>.json. A plot beside it."),
    ] = None,
) -> None:
    """Time a rank adapter along each of its sizes, with tokens and with threads, and fit lines.

    Example:  python -m bench.scale
    """
    stamp = conditions()
    threads = thread_counts()
    typer.echo(f"{stamp}\ntiming a linear along {', '.join(AXES)}")
    with torch.inference_mode():
        kernels = sweep(BASE, AXES, threads, rounds)
    path = output or RESULTS / f"scale-{processor()}.json"
    write_json(path, stamp, {"kernels": kernels})
    draw(kernels, path.with_suffix(".png"), stamp)
    typer.echo(f"wrote {path} and {path.with_suffix('.png')}")


def draw(kernels: dict, path: Path, stamp: str) -> None:
    """Times along every axis, and the lines fitted to them."""
    curves = {name: found for name, found in kernels.items() if ", " in name}
    axes_of = sorted({name.split(", ")[0] for name in curves})
    figure, axes = plt.subplots(1, len(axes_of), figsize=(3 * len(axes_of), 3), layout="constrained")
    for place, axis in zip(axes, axes_of, strict=True):
        for name, found in curves.items():
            if name.split(", ")[0] == axis:
                ends = [min(found["values"]), max(found["values"])]
                (points,) = place.plot(found["values"], found["us"], "o", label=name.split(", ")[1])
                line = [found["constant"] + found["each"] * value for value in ends]
                place.plot(ends, line, "-", lw=1, color=points.get_color())
        place.set_xlabel(axis)
        place.set_ylim(bottom=0)
        place.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("µs")
    figure.supxlabel(stamp, fontsize=6, color="0.4")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
