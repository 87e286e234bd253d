"""The command: `python -m bench.gpu`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu import tests
from bench.gpu.stages import Stages
from bench.kernels.cases import MODELS
from bench.report.results import RESULTS, ROOT, card, conditions, read_csv, write, write_csv

FIRST = "Llama-2-7B"
OTHERS = ("Llama-3-8B", "Llama-3.2-1B")
TOKENS = (1, 2, 4, 8, 16, 64, 512)
INTERPRETER = 1800.0  # seconds, for the tests in Triton's interpreter, which is slow
PARTS = ROOT / "build" / "gpu"  # the results of each stage


def main(
    only: Annotated[str, typer.Option(help="Time only this model, one of: " + ", ".join(MODELS))] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    peer_dir: Annotated[Path | None, typer.Option(help="Folder with checkouts RaNA/ and TEAL/.")] = None,
    seconds: Annotated[
        float, typer.Option(help="Time limit for all of it; the log says what is left out.")
    ] = 450.0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Test and time the ops on this machine's card. Without a card, run the tests in Triton's interpreter.

    The stages: the limits of the card; tests of the ops on some cases; times of the ops that pass, for one
    token through Llama-2-7B, then with weights of 8 and 4 bits; all tests; the other times; the sanitizer.
    Each stage has a time limit, and writes its results at its end: <card>-limits.csv, <card>.csv,
    <card>-bits.csv, and everything printed to <card>.txt. The command fails if anything failed.
    RANA_REVISION names the revision of a copy without its history.

    Example:  python -m bench.gpu --only Llama-2-7B --peer-dir ../checkouts
    """
    if only and only not in MODELS:
        raise typer.BadParameter(f"{only}: wanted one of {', '.join(MODELS)}", param_hint="--only")
    PARTS.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        stages = Stages(PARTS / "interpreter.txt", time.monotonic() + INTERPRETER)
        stages.say("no CUDA device: the tests run in Triton's interpreter, and nothing is timed")
        stages.run("tests", tests.interpreted(), INTERPRETER)
        raise typer.Exit(bool(stages.red))
    for part in PARTS.glob("*.csv"):
        part.unlink()
    log = output / f"{card()}.txt"
    stamp = conditions("cuda")
    write(log, f"# {stamp}\n")
    stages = Stages(log, time.monotonic() + seconds)
    stages.say(stamp)
    run(stages, only, dtype, peer_dir, output)
    stages.say("red: " + ("; ".join(stages.red) or "nothing"))
    raise typer.Exit(bool(stages.red))


def run(stages: Stages, only: str, dtype: str, peer_dir: Path | None, output: Path) -> None:
    module = [sys.executable, "-m"]
    for backend in (name for name in tests.IMPLEMENTATIONS if name not in tests.served()):
        stages.say(f"{backend}: not installed, so not tested and not timed")
        stages.red.append(f"{backend} is not here")
    limits = output / f"{card()}-limits.csv"
    stages.run("limits", {"limits": [*module, "bench.gpu.limits", str(limits)]}, 60)
    red = stages.run("the ops, exact and close", tests.gates(), tests.GATES)
    red_options = [word for name in red for word in ("--red", name)]
    options = [*red_options, *(["--peer-dir", str(peer_dir)] if peer_dir else [])]

    def timed(name: str, models: tuple[str, ...], tokens: tuple[int, ...], dtype: str, limit: float) -> None:
        wanted = [f"--model={model}" for model in models] + [f"--tokens={M}" for M in tokens]
        part = PARTS / f"{name.replace(' ', '-')}.csv"
        command = [*module, "bench.gpu.ops", str(part), *wanted, "--dtype", dtype, *options]
        stages.run(name, {"times": command}, limit)
        publish(output)

    first = only or FIRST
    timed("times of one token", (first,), (1,), dtype, 100)
    bits = str(output / f"{card()}-bits.csv")
    command = [*module, "bench.gpu.bits", bits, f"--model={first}", "--tokens=1", *red_options]
    stages.run("times in 8 and 4 bits", {"times in bits": command}, 60)
    stages.run("all tests", tests.everything(), 200)
    if peer_dir:
        timed("times of others", (first,), (1,), "fp16", 60)
    if not only:
        timed("times of other models", OTHERS, (1,), dtype, 60)
    timed("times of several tokens", (first,), TOKENS[1:], dtype, 120)
    stages.run("sanitizer", tests.sanitizer(), 180)


def publish(output: Path) -> None:
    """Write the results of all stages as one file."""
    found = [read_csv(part) for part in sorted(PARTS.glob("*.csv"), key=lambda p: p.stat().st_mtime)]
    if found:
        write_csv(output / f"{card()}.csv", found[0][0], [dict(row) for _, rows in found for row in rows])


if __name__ == "__main__":
    typer.run(main)
