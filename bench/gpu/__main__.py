"""The command: `python -m bench.gpu`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.decode.models import SHAPES
from bench.gpu import tests
from bench.gpu.stages import Stages
from bench.kernels.cases import MODELS, QUANTIZED_COST_RATIO
from bench.report.results import RESULTS, card, conditions, read_csv, write, write_csv

FIRST = "Llama-2-7B"
OTHERS = ("Llama-3-8B", "Llama-3.2-1B")
TOKENS = (1, 2, 4, 8, 16, 64, 512)
INTERPRETER = 1800.0  # seconds, for the tests in Triton's interpreter, which is slow
PARTS = tests.RECORD.parent  # the results of each stage


def main(
    only: Annotated[str, typer.Option(help="Time only this model, one of: " + ", ".join(MODELS))] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    peer_dir: Annotated[Path | None, typer.Option(help="Folder with checkouts RaNA/ and TEAL/.")] = None,
    seconds: Annotated[
        float, typer.Option(help="Time limit for all of it. What is left is done by the next call.")
    ] = 540.0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Test and time the ops on this machine's card. Without a card, run the tests in Triton's interpreter.

    The stages: the limits of the card; tests of the ops on some cases; times of the ops that pass, for one
    token through Llama-2-7B, then with weights of 8 and 4 bits; whole compiled steps of that model; several
    tokens; float16; compute-sanitizer; a table of Triton's configurations; all tests; other models.
    Each stage has a time limit, and writes its results at its end: <card>-limits.csv, <card>.csv,
    <card>-bits.csv, decode-<model>-4-bits-compiled-<card>.csv, <card>-triton.json, and everything printed to
    <card>.txt. The limits come to 22 minutes: call the command again for what is left.
    The command fails if anything failed or is left.
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
    stamp, log = conditions("cuda"), output / f"{card()}.txt"
    stages = Stages(log, time.monotonic() + seconds, tests.RECORD, stamp)
    if not stages.done:
        for part in PARTS.glob("*.csv"):
            part.unlink()
        write(log, f"# {stamp}\n")
    stages.say(stamp)
    run(stages, only, dtype, peer_dir, output)
    stages.end()
    raise typer.Exit(bool(stages.red or stages.missing))


def run(stages: Stages, only: str, dtype: str, peer_dir: Path | None, output: Path) -> None:
    module = [sys.executable, "-m"]
    for backend in (name for name in tests.IMPLEMENTATIONS if name not in tests.served()):
        stages.say(f"{backend}: not installed, so not tested and not timed")
        stages.red.append(f"{backend} is not here")
    limits = output / f"{card()}-limits.csv"
    stages.run("limits", {"limits": [*module, "bench.gpu.limits", str(limits)]}, 60)
    red = stages.run(tests.GATES_STAGE, tests.gates(), tests.GATES)
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
    if first in SHAPES:
        steps = output / f"decode-{first}-4-bits-compiled-{card()}.csv".lower()
        how = ["--device=cuda", "--compile", "--bits=4", "--prompt=32", "--batch=1", "--turn=32"]
        asked = [f"--cost-ratio={QUANTIZED_COST_RATIO}", f"--output={steps}"]
        command = [*module, "bench.decode", first, *how, *asked]
        stages.run("whole steps in 4 bits", {"steps": command}, 240)
    timed("times of several tokens", (first,), TOKENS[1:], dtype, 120)
    timed("times in float16", (first,), (1,), "fp16", 60)
    stages.run("sanitizer", tests.sanitizer(), 180)
    if first in SHAPES:
        table = str(output / f"{card()}-triton.json")
        stages.run("configurations", {"tuning": [*module, "bench.gpu.tune", table, f"--model={first}"]}, 90)
    stages.run("all tests", tests.everything(), 200)
    if not only:
        timed("times of other models", OTHERS, (1,), dtype, 60)


def publish(output: Path) -> None:
    """Write the results of all stages as one file."""
    found = [read_csv(part) for part in sorted(PARTS.glob("*.csv"), key=lambda p: p.stat().st_mtime)]
    if found:
        write_csv(output / f"{card()}.csv", found[0][0], [dict(row) for _, rows in found for row in rows])


if __name__ == "__main__":
    typer.run(main)
