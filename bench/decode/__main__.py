"""The command: `python -m bench.decode`."""

import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bench.__main__ import require_green_tests
from bench.decode import rivals as others
from bench.decode.measure import (
    Setting,
    Steps,
    measure_drafts,
    random_tokens,
    share_rows,
    take_turns,
    where_time_goes,
)
from bench.decode.models import SHAPES, from_directory, from_random, random_model
from bench.decode.steps import Decoder, compiled, forget_compiled
from bench.decode.widths import in_bits
from bench.gpu.tests import require_green_gates
from bench.kernels.cases import COST_RATIO
from bench.kernels.timing import thread_counts, using
from bench.kernels.weights import DTYPES
from bench.quality import smollm2
from bench.report.results import RESULTS, Row, card, conditions, processor, write, write_csv
from bench.report.tables import show
from rana_kernels.evaluation.metrics import perplexity

DRAFT_PROMPTS, DRAFT_PROMPT, DRAFT_TOKENS = 4, 64, 64
Models = dict[str, PreTrainedModel]
console = Console(record=True, width=None if sys.stdout.isatty() else 160)


def main(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(SHAPES)}, smollm2, or the directory of a model with its texts.")
    ],
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens before; several times for several; default 32 and 1024.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Texts at a time; several times for several; default 1, 2, 4, 8.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads; default 1 and all.")] = None,
    cost_ratio: Annotated[float, typer.Option(help="Cost of the blocks' linears, dense = 1.")] = COST_RATIO,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    bits: Annotated[
        int, typer.Option(help="8 or 4: weights in so many bits, with masks on inputs and without masks.")
    ] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile: Annotated[bool, typer.Option(help="Time compiled steps, not eager ones.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Every contender decodes once a round.")] = 9,
    turn: Annotated[int, typer.Option(min=1, help="Tokens a contender decodes in a round.")] = 4,
    read: Annotated[
        int, typer.Option(help="Most tokens of all prompts together; longer ones are random keys.")
    ] = 8192,
    tokens: Annotated[int, typer.Option(help="At most so many of each text of a directory.")] = 102_400,
    tests: Annotated[
        bool, typer.Option(help="Run the tests of the ops first; without them nothing is written.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="CSV; default bench/results/decode-….csv.")] = None,
    rivals: Annotated[
        list[str] | None,
        typer.Option(help=f"Compare with {', '.join(others.RIVALS)}; several times for several."),
    ] = None,
) -> None:
    """Time whole models in turns: dense, dense with our product, static low rank, RaNA.

    A shape has random weights, and thresholds such that masks keep what the plan says. A directory is
    compressed on its calibration.safetensors, and each row has its perplexity on evaluation.safetensors.

    All models have the same static cache and the same loop. Tokens a second are those of all texts together.
    One thread is timed by its processor time, several by the clock. On a card every step is the replay of a
    CUDA graph. --compile compiles steps; prompts are read eagerly, as `generate` of transformers does. Four
    models of 7B take a card three minutes to compile.

    Example:  python -m bench.decode Llama-3.2-1B --prompt 32 --batch 1 --threads 1
    With --rivals, whole programs write texts: transformers, the rivals, and ours in 16, 8 and 4 bits, dense
    and at three costs. One text; `turn` tokens a round. --no-tests then writes to --output alone, marked
    untested.

    With others:  python -m bench.decode Llama-3.2-1B --rivals llama.cpp --rounds 5 --turn 32
    On a card:  python -m bench.decode Llama-2-7B --device cuda --compile --prompt 32 --batch 1 --turn 32
    In 4 bits:  the same with --bits 4 --cost-ratio 0.7
    """
    if rivals:
        others.check(rivals)
        _check_output(tests, output)
    if bits not in others.WIDTHS or (bits < 16 and (rivals or model not in SHAPES)):
        raise typer.BadParameter("--bits takes 8 or 4 for a shape; --rivals has all widths, of any model")
    prompt, batch = prompt or [32, 1024], batch or [1, 2, 4, 8]
    on_card = device == "cuda"
    if tests:
        require_green_gates() if on_card else require_green_tests()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    mode = "compiled" if compile else "eager"
    stamp = conditions(device)
    folder = None if model in SHAPES else smollm2.fetch() if model == smollm2.NAME else Path(model)
    texts = {}
    if folder:
        texts = {name: smollm2.read_text(folder, name, tokens) for name in ("calibration", "evaluation")}
    if rivals:
        return _compare(model, folder, texts, rivals, threads, prompt, turn, rounds, tests, output, stamp)
    if bits < 16:
        models = in_bits(random_model(SHAPES[model], DTYPES[dtype], device), bits, cost_ratio)
    elif folder:
        models = from_directory(folder, texts["calibration"], cost_ratio, DTYPES[dtype], device)
    else:
        models = from_random(random_model(SHAPES[model], DTYPES[dtype], device), cost_ratio)
    room = models["dense"].config.max_position_embeddings - turn * (rounds + 1) - 1
    counts = threads or thread_counts()
    counts = counts[-1:] if on_card else counts
    long = [T for T in prompt if room < T]
    grid = [Setting(T, M, n, read >= T * M) for T, M, n in product(prompt, batch, counts) if T not in long]
    console.print(f"{Path(model).name}, {dtype}, cost {cost_ratio}, {mode}: {stamp}")
    if long:
        console.print(f"left out, because the model has too few positions: prompts of {long}")

    losses = _perplexities(models, texts.get("evaluation"))
    facts = {"model": Path(model).name, "dtype": dtype, "cost_ratio": cost_ratio, "mode": mode}
    timed: list[Row] = []
    for setting in track(grid, "timing", console=console):
        found = take_turns(_steps(models, compile), setting, rounds, turn)
        timed += [facts | row | {"perplexity": losses[str(row["contender"])]} for row in found]
    show(console, "time to the first token, and tokens a second after it (medians)", timed)
    for count in counts:
        if not on_card:  # a profile of the processor shows nothing of a graph
            _show_shares(_steps(models, compile), Setting(prompt[0], 1, count, read=True))
        if folder:
            _show_drafts(models, texts["evaluation"], count)
    if tests:
        machine = card() if on_card else processor()
        width = f"-{bits}-bits" if bits < 16 else ""
        path = output or RESULTS / f"decode-{Path(model).name}{width}-{mode}-{machine}.csv".lower()
        write_csv(path, stamp, timed)
        write(path.with_suffix(".txt"), console.export_text())
        console.print(f"wrote {path}, and all that was printed to {path.with_suffix('.txt').name}")


def _check_output(tests: bool, output: Path | None) -> None:
    if not tests and (output is None or output.resolve().is_relative_to(RESULTS)):
        raise typer.BadParameter(f"--no-tests needs an --output outside of {RESULTS}: it is untested")


def _compare(
    name: str, folder: Path | None, texts: dict[str, Tensor], rivals: list[str], threads: list[int] | None,
    prompts: list[int], turn: int, rounds: int, tests: bool, output: Path | None, stamp: str,
) -> None:  # fmt: skip
    """Write the table of whole programs. All weights are bfloat16 before they are rounded."""
    model: PreTrainedModel = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        if folder
        else random_model(SHAPES[name], torch.bfloat16, "cpu")
    )
    stamp += "".join(f", {others.RIVALS[rival]} {version(others.RIVALS[rival])}" for rival in rivals)
    stamp += "" if tests else ", untested"
    console.print(f"{Path(name).name}, prompts of {prompts}, {turn} tokens: {stamp}")
    rows: list[Row] = []
    for row in others.compare(model, texts, rivals, threads or thread_counts(), prompts, turn, rounds):
        rows.append({"model": Path(name).name, **row})
        console.print(", ".join(f"{key} {value}" for key, value in row.items()), soft_wrap=True)
    show(console, "whole programs (medians)", rows)
    path = output or RESULTS / f"rivals-{Path(name).name}-{processor()}.csv".lower()
    write_csv(path, stamp, rows)
    console.print(f"wrote {path}")


def _perplexities(models: Models, token_ids: Tensor | None) -> dict[str, object]:
    if token_ids is None:
        return dict.fromkeys(models, "random weights")
    return {name: round(perplexity(m, token_ids).perplexity, 3) for name, m in models.items()}


def _steps(models: Models, compile: bool) -> Steps:
    forget_compiled()  # every size is compiled anew
    return {name: (model, compiled(model) if compile else model.forward) for name, model in models.items()}


@torch.inference_mode()
def _show_shares(steps: Steps, setting: Setting) -> None:
    shares = {}
    with using(setting.threads):
        for name, (model, step) in steps.items():
            decoder = Decoder(model, 1, setting.prompt + 17, step)
            decoder.read(random_tokens(model, setting))
            decoder.decode(8)
            shares[name] = where_time_goes(decoder)
    title = f"milliseconds of a step (calls), profiled, {setting.threads} threads"
    show(console, title, share_rows(shares))


def _show_drafts(models: Models, text: Tensor, threads: int) -> None:
    prompts = text[:DRAFT_PROMPTS, :DRAFT_PROMPT].to(models["dense"].device)
    with using(threads):
        found = measure_drafts(models["dense"], models["rana"], prompts, DRAFT_TOKENS)
    show(console, f"RaNA drafts for the dense model, {threads} threads", found)


if __name__ == "__main__":
    typer.run(main)
