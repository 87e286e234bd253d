"""`python -m bench`: run the tests of the ops, then time every kernel against its baselines."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bench.kernels import check, compare
from bench.kernels.case import Case
from bench.kernels.cases import COST_RATIO, MODELS, PUBLISHED, QUANTIZED, grid
from bench.kernels.timing import measure, thread_counts
from bench.kernels.weights import DTYPES
from bench.report.results import RESULTS, ROOT, conditions, processor, write_csv, write_json
from bench.report.tables import show
from rana_kernels.backends import NAMES

console = Console(width=None if sys.stdout.isatty() else 190)
HIDDEN = ("p20", "p80", "GFLOP/s", "peak GFLOP/s")  # in the files, not in the printed table


def main(
    only: Annotated[str, typer.Option(help="Run the cases whose name has this regular expression.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="Time the linears of this model, one of: " + ", ".join(MODELS))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(min=0.01, max=1, help="Live share of the stored rows; default 0.56.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens in a call; default 1.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32; default bf16.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend of our ops; default auto.")] = None,
    quantized: Annotated[
        bool, typer.Option(help="Run the cases in 16, 8 and 4 bits instead of the published ones.")
    ] = False,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1 and all.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a case.")] = 15,
    csv: Annotated[
        Path | None,
        typer.Option(help="Default: bench/results/[quantized-]<processor>.csv, if all of its cases are run."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the same rows as JSON.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REV", help="Compare this revision's kernels with those of REV.")
    ] = None,
    against: Annotated[
        bool, typer.Option("--check", help="Fail if a case is slower than stored; by default on one thread.")
    ] = False,
) -> None:
    """Time the ops on this machine's processor. For a graphics card use python -m bench.gpu.

    Without --model, --density, --tokens and --dtype the published cases are run. With one of them, all
    combinations of what is given are run. --quantized runs cases of its own: each beside the same op in 16
    bits and torch's quantised products, which take turns with it. All options but --only, --quantized and
    --rounds may be given several times.

    Contenders take turns on rotated copies of their weights, which are larger than the last-level cache.
    `x dense` and its neighbours say how many times as fast as that baseline ours is. `% of stream` compares
    the weight bytes that ours must read, over its time, with the best streaming loop of the same rounds.
    `error` compares ours with float64. On one thread, processor time is counted.

    Nothing is timed unless the tests of the ops pass.

    Example:  python -m bench --model Llama-3.2-1B --tokens 1 --tokens 4 --dtype bf16 --threads 1
    """
    chosen = find_cases(only, model, density, tokens, dtype, QUANTIZED if quantized else PUBLISHED)
    served = backend or ["auto"]
    _require_known("--backend", served, NAMES)
    require_green_tests()
    counts = threads or thread_counts()
    stamp = conditions()
    console.print(stamp)
    if base is not None:
        try:
            rows = compare.against(base, chosen, counts, rounds, console)
        except ValueError as error:  # no such revision, or it does not build
            console.print(f"[red]error:[/red] {error}")
            raise typer.Exit(1) from None
        stamp += f", against {base}"
        show(console, f"this revision against {base} (`x base`: how many times as fast)", rows)
    elif against:
        # on one thread, other programs' turns do not count
        stored = RESULTS / f"{'quantized-' * quantized}{processor()}.csv"
        raise typer.Exit(check.against(stored, chosen, threads or [1], rounds, console))
    else:
        steps = len(chosen) * len(served) * len(counts)
        timed = measure(chosen, served, counts, rounds)
        rows = list(track(timed, "timing", total=steps, console=console))
        show(console, "rana ops against their baselines (medians)", rows, HIDDEN)
        if chosen in (PUBLISHED, QUANTIZED) and not (backend or threads):
            csv = csv or RESULTS / f"{'quantized-' * quantized}{processor()}.csv"
    if csv:
        write_csv(csv, stamp, rows)
        console.print(f"wrote {csv}")
    if json:
        write_json(json, stamp, {"rows": rows})
        console.print(f"wrote {json}")


def find_cases(
    only: str,
    models: list[str] | None,
    densities: list[float] | None,
    tokens: list[int] | None,
    dtypes: list[str] | None,
    found: list[Case],
) -> list[Case]:
    """Return the cases `found`, or those of a grid, whose names have `only`."""
    _require_known("--model", models or [], MODELS)
    _require_known("--dtype", dtypes or [], DTYPES)
    if models or densities or tokens or dtypes:
        found = grid(models or list(MODELS), densities or [COST_RATIO], tokens or [1], dtypes or ["bf16"])
    chosen = [case for case in found if re.search(only, case.name)]
    if not chosen:
        raise typer.BadParameter(
            f"{only!r} is in no case's name, such as {found[0].name!r}", param_hint="--only"
        )
    return chosen


def _require_known(option: str, given, known) -> None:
    for value in given:
        if value not in known:
            raise typer.BadParameter(f"{value}: wanted one of {', '.join(known)}", param_hint=option)


def require_green_tests() -> None:
    """Run the tests of the ops. Raise typer.Exit if one fails."""
    tests = [ROOT / "tests/test_ops.py", ROOT / "tests/test_ops_properties.py"]
    console.print("testing the ops first")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", *tests]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        console.print("[red]the tests of the ops fail: no numbers")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
