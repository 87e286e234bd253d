"""`python -m bench`: the tests of the ops, then every kernel against its baselines, in a table and a CSV."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bench import check, compare
from bench.baselines import DTYPES
from bench.kernels import PUBLISHED, Case
from bench.measure import measure
from bench.models import KEEP, MODELS, grid
from bench.report import RESULTS, ROOT, conditions, processor, show, write_csv, write_json
from bench.timing import thread_counts
from rana_kernels.backends import NAMES

console = Console(width=None if sys.stdout.isatty() else 190)
HIDDEN = ("p20", "p80", "GFLOP/s", "peak GFLOP/s")  # in the files, not in the table


def main(
    only: Annotated[str, typer.Option(help="Regular expression: the cases to run, by name.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="Linears of this model, of: " + ", ".join(MODELS))
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(min=0.01, max=1, help="Live of the stored rows; default 0.56.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens in a call; default 1.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32; default bf16.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Who serves our ops; default auto.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Default 1 and all.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds a case.")] = 15,
    csv: Annotated[
        Path | None,
        typer.Option(help="Default bench/results/<processor>.csv, if all published cases are run."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="The same rows as JSON.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REV", help="Compare with this revision of ours.")
    ] = None,
    against: Annotated[
        bool,
        typer.Option(
            "--check", help="Fail if a case is slower than in the stored results; on one thread by default."
        ),
    ] = False,
) -> None:
    """Time the ops on this machine's processor. A graphics card, and published kernels: python -m bench.gpu.

    Without --model, --density, --tokens or --dtype the cases are those of the published results; with one of
    them, all combinations of what is given. Options but --only and --rounds may be given several times.

    Contenders take turns on rotated copies of their weights, larger than the last-level cache. `x dense`
    and its neighbours say how many times as fast as that baseline ours is; `% of stream` is the weight
    bytes that ours must read, over its time, against the best streaming loop timed in the same rounds;
    `error` is ours against float64. One thread is timed by its own processor time.

    Nothing is timed unless the tests of the ops pass.

    Example:  python -m bench --model Llama-3.2-1B --tokens 1 --tokens 4 --dtype bf16 --threads 1
    """
    chosen = find_cases(only, model, density, tokens, dtype)
    served = backend or ["auto"]
    unknown = [name for name in served if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: wanted one of {', '.join(NAMES)}", param_hint="--backend")
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
        # one thread by default: other programs' turns do not count in its time
        raise typer.Exit(
            check.against(RESULTS / f"{processor()}.csv", chosen, threads or [1], rounds, console)
        )
    else:
        steps = len(chosen) * len(served) * len(counts)
        timed = measure(chosen, served, counts, rounds)
        rows = list(track(timed, "timing", total=steps, console=console))
        show(console, "rana ops against their baselines (medians)", rows, HIDDEN)
        if chosen == PUBLISHED and not (backend or threads):
            csv = csv or RESULTS / f"{processor()}.csv"
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
) -> list[Case]:
    for name, given, known in (("--model", models, MODELS), ("--dtype", dtypes, DTYPES)):
        unknown = [value for value in given or [] if value not in known]
        if unknown:
            raise typer.BadParameter(f"{unknown[0]}: wanted one of {', '.join(known)}", param_hint=name)
    found = PUBLISHED
    if models or densities or tokens or dtypes:
        found = grid(models or list(MODELS), densities or [KEEP], tokens or [1], dtypes or ["bf16"])
    chosen = [case for case in found if re.search(only, case.name)]
    if not chosen:
        raise typer.BadParameter(
            f"{only!r} is in no case's name, such as {found[0].name!r}", param_hint="--only"
        )
    return chosen


def require_green_tests() -> None:
    tests = [ROOT / "tests/test_ops.py", ROOT / "tests/test_ops_properties.py"]
    console.print("testing the ops first")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", *tests],
        cwd=ROOT,
        check=False,
    )
    if result.returncode != 0:
        console.print("[red]the tests of the ops fail: no numbers")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
