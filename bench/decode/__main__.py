"""The command: `python -m bench.decode`."""

import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from bench import report
from bench.__main__ import require_green_tests
from bench.baselines import DTYPES
from bench.decode import contenders, drafts, tables
from bench.decode.measure import Setting, Steps, random_tokens, take_turns
from bench.decode.profile import where_time_goes
from bench.decode.shapes import SHAPES, random_model
from bench.decode.steps import Decoder, compiled, forget_compiled
from bench.gpu import card
from bench.gpu.tests import require_green_gates
from bench.models import KEEP
from bench.timing import thread_counts, using
from rana_kernels.evaluation.metrics import perplexity

DRAFT_PROMPTS, DRAFT_PROMPT, DRAFT_TOKENS = 4, 64, 64
Models = dict[str, PreTrainedModel]
console = Console(record=True, width=None if sys.stdout.isatty() else 160)


def main(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(SHAPES)}, or the directory of a model with its tokens.")
    ],
    prompt: Annotated[list[int], typer.Option(help="Tokens before; several times for several.")] = [32, 1024],  # noqa: B006 - typer wants a list
    batch: Annotated[list[int], typer.Option(help="Rows at a time; likewise.")] = [1, 2, 4, 8],  # noqa: B006
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts; default 1 and all.")] = None,
    keep: Annotated[float, typer.Option(help="Cost of the blocks' linears, dense = 1.")] = KEEP,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile: Annotated[bool, typer.Option(help="Compiled steps, in place of eager ones.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="In each of them every contender decodes.")] = 9,
    turn: Annotated[int, typer.Option(min=1, help="Tokens that it decodes in a round.")] = 4,
    read: Annotated[int, typer.Option(help="Longer prompts, all rows together, are made up.")] = 8192,
    tokens: Annotated[int, typer.Option(help="At most so many, of each text of a directory.")] = 102_400,
    tests: Annotated[bool, typer.Option(help="Run those of the ops first, or write nothing.")] = True,
    output: Annotated[Path | None, typer.Option(help="CSV; default bench/results/decode-….csv.")] = None,
) -> None:
    """Time whole models, taking turns: dense, dense with our product, static low rank, RaNA.

    A shape has random weights, and thresholds such that the masks keep what the plan says. A directory is
    compressed on its calibration.safetensors, and has its perplexity on evaluation.safetensors in each
    row. All have the same static cache and the same loop; tokens a second are those of all rows together.
    One thread is timed by the processor time that it takes, several by the clock. On a card every step is
    the replay of a CUDA graph. Steps are what --compile compiles: prompts are read eagerly, as `generate` of
    transformers does. Four models of 7B take a card three minutes to compile.

    Example:  python -m bench.decode Llama-3.2-1B --prompt 32 --batch 1 --threads 1
    On a card:  python -m bench.decode Llama-2-7B --device cuda --compile --prompt 32 --batch 1 --turn 32
    """
    on_card = device == "cuda"
    if tests:
        require_green_gates() if on_card else require_green_tests()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    mode = "compiled" if compile else "eager"
    stamp = card.conditions() if on_card else report.conditions()
    folder = None if model in SHAPES else Path(model)
    texts = {}
    if folder:
        texts = {name: _text(folder, name, tokens) for name in ("calibration", "evaluation")}
        models = contenders.from_directory(folder, texts["calibration"], keep, DTYPES[dtype], device)
    else:
        models = contenders.from_random(random_model(SHAPES[model], DTYPES[dtype], device), keep)
    room = models["dense"].config.max_position_embeddings - turn * (rounds + 1) - 1
    counts = threads or thread_counts()
    counts = counts[-1:] if on_card else counts
    long = [T for T in prompt if room < T]
    grid = [Setting(T, M, n, read >= T * M) for T, M, n in product(prompt, batch, counts) if T not in long]
    console.print(f"{Path(model).name}, {dtype}, keep {keep}, {mode}: {stamp}")
    if long:
        console.print(f"left out, for the model has no positions for them: prompts of {long}")

    losses = _perplexities(models, texts.get("evaluation"))
    facts = {"model": Path(model).name, "dtype": dtype, "keep": keep, "mode": mode}
    rows = []
    for setting in track(grid, "timing", console=console):
        found = tables.rows(setting, take_turns(_steps(models, compile), setting, rounds, turn))
        rows += [facts | row | {"perplexity": losses[row["contender"]]} for row in found]
    report.show(console, "time to the first token, and tokens a second after it (medians)", rows)
    for count in counts:
        if not on_card:  # a profile of the processor shows nothing of a graph
            _show_shares(_steps(models, compile), Setting(prompt[0], 1, count, read=True))
        if folder:
            _show_drafts(models, texts["evaluation"], count)
    if tests:
        machine = card.card() if on_card else report.processor()
        path = output or report.RESULTS / f"decode-{Path(model).name}-{mode}-{machine}.csv".lower()
        report.write_csv(path, stamp, rows)
        report.write(path.with_suffix(".txt"), console.export_text())
        console.print(f"wrote {path}, and all that was printed to {path.with_suffix('.txt').name}")


def _text(folder: Path, name: str, tokens: int) -> Tensor:
    rows = load_file(folder / f"{name}.safetensors")["input_ids"].long()
    return rows[: max(1, tokens // rows.shape[1])]


def _perplexities(models: Models, rows: Tensor | None) -> dict[str, object]:
    if rows is None:
        return dict.fromkeys(models, "random weights")
    return {name: round(perplexity(m, rows).perplexity, 3) for name, m in models.items()}


def _steps(models: Models, compile: bool) -> Steps:
    forget_compiled()  # every size is compiled for itself
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
    console.print(tables.share_table(shares, setting.threads))


def _show_drafts(models: Models, text: Tensor, threads: int) -> None:
    prompts = text[:DRAFT_PROMPTS, :DRAFT_PROMPT].to(models["dense"].device)
    with using(threads):
        found = drafts.measure_drafts(models["dense"], models["rana"], prompts, DRAFT_TOKENS)
    console.print(tables.draft_table(found, threads))


if __name__ == "__main__":
    typer.run(main)
