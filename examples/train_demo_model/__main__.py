"""The command: `python -m examples.train_demo_model`."""

from __future__ import annotations

import json
import math
import shutil
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples import train_demo_model
from examples.train_demo_model.checkpoints import (
    LogLine,
    append_log,
    load_checkpoint,
    restart_log,
    save_checkpoint,
)
from examples.train_demo_model.model import (
    Architecture,
    Recipe,
    learning_rate,
    new_model,
    new_optimizer,
    perplexity,
    step_rows,
    train_step,
)
from examples.train_demo_model.text import (
    ROW,
    corpus_digest,
    pack,
    read_library,
    save_tokenizer,
    split_library,
    train_tokenizer,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HELD_OUT_ROWS = 256

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=train_demo_model.__doc__)

LOG_EVERY = 10
EVALUATE_EVERY = 200
SAVE_EVERY = 100
GLANCE_ROWS = 64  # rows of the evaluation split read at intervals; the final figure reads all


def progress_bar() -> Progress:
    """Return the bar: steps, loss, tokens a second, time left."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def glance(model: PreTrainedModel, evaluation: Tensor) -> float:
    """Return the perplexity on a few evaluation rows, in the precision of training."""
    with torch.autocast(model.device.type, torch.bfloat16):
        return perplexity(model, evaluation[:GLANCE_ROWS])


def due(step: int, interval: int, recipe: Recipe) -> bool:
    """Tell whether something done at intervals, and at the end, is done after `step` steps."""
    return step % interval == 0 or step == recipe.steps


def timed_step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    recipe: Recipe,
    rows: Tensor,
    step: int,
    seconds: float,
) -> LogLine:
    """Take step `step` (from 0) on the training rows; add its time to `seconds`."""
    started = time.perf_counter()
    rate = learning_rate(recipe, step)
    loss = train_step(model, optimizer, step_rows(recipe, rows, step), rate)
    seconds += time.perf_counter() - started
    return LogLine(step + 1, (step + 1) * recipe.rows_per_step * ROW, loss, rate, seconds)


def fit(
    model: PreTrainedModel, recipe: Recipe, splits: dict[str, Tensor], work_dir: Path, identity: str
) -> None:
    """Train `model` in place, from the checkpoint in `work_dir` if there is one."""
    optimizer = new_optimizer(model)
    checkpoint, log = work_dir / "checkpoint.safetensors", work_dir / "training_log.csv"
    first, seconds = load_checkpoint(checkpoint, model, optimizer, identity)
    restart_log(log, first)
    with progress_bar() as progress:
        bar = progress.add_task("", total=recipe.steps, completed=first, loss=math.nan, speed=0.0)
        for step in range(first, recipe.steps):
            line = timed_step(model, optimizer, recipe, splits["training"], step, seconds)
            speed = recipe.rows_per_step * ROW / (line.seconds - seconds)
            seconds = line.seconds
            progress.update(bar, completed=line.step, loss=line.loss, speed=speed)
            if due(line.step, EVALUATE_EVERY, recipe):
                line.eval_perplexity = glance(model, splits["evaluation"])
                progress.console.print(
                    f"step {line.step}: loss {line.loss:.3f}, perplexity {line.eval_perplexity:.2f}"
                )
            if due(line.step, LOG_EVERY, recipe):
                append_log(log, line)
            if due(line.step, SAVE_EVERY, recipe):
                save_checkpoint(checkpoint, model, optimizer, line.step, seconds, identity)


def encode_splits(splits: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Tokenize every split to int32 rows [n, 512]; a held-out split has at most 256 of them."""
    encoded = {name: pack(tokenizer, texts) for name, texts in splits.items()}
    for name in ("calibration", "evaluation"):
        encoded[name] = encoded[name][:HELD_OUT_ROWS].clone()
    for name, rows in encoded.items():
        console.print(f"{name}: {len(splits[name])} files, {rows.numel():,} tokens used")
    return encoded


def prepare(root: Path) -> tuple[Tokenizer, dict[str, Tensor], str]:
    """Read the library under `root`; return the tokenizer, the packed splits and the digest."""
    texts = read_library(root)
    digest = corpus_digest(texts)
    console.print(f"{len(texts)} files of {root}; SHA-256 {digest}")
    splits = split_library(texts)
    tokenizer = train_tokenizer(splits["training"])
    return tokenizer, encode_splits(splits, tokenizer), digest


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)


def save_data(splits: dict[str, Tensor], root: Path, work_dir: Path, folder: Path) -> None:
    """Write the held-out tokens, the training log, and the licence of the text they come from."""
    for name in ("calibration", "evaluation"):
        save_file({"input_ids": splits[name]}, folder / f"{name}.safetensors")
    shutil.copyfile(work_dir / "training_log.csv", folder / "training_log.csv")
    licence = root / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, folder / "LICENSE-python.txt")


@app.command()
def train(
    architecture: Annotated[Architecture, typer.Option(help="Model to train.")] = Architecture.llama,
    out: Annotated[
        Path, typer.Option(help="Folder for the finished model.", show_default="examples/demo_model")
    ] = REPOSITORY / "examples" / "demo_model",
    work_dir: Annotated[
        Path,
        typer.Option(
            help="Folder for the checkpoint; a run continues from what it finds.",
            show_default="build/demo_model",
        ),
    ] = REPOSITORY / "build" / "demo_model",
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the checkpoint and start again.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2600,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2.5e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of rising learning rate.")] = 150,
    cosine_steps: Annotated[
        int, typer.Option(min=1, help="Steps over which the cosine would fall to a twentieth.")
    ] = 2600,
    cooldown_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Last steps, with a rate falling to zero and rows of 512 tokens (before: 256)."
        ),
    ] = 200,
    rows_per_step: Annotated[
        int, typer.Option(min=1, help="Rows of 512 tokens in a step (8 is 4096 tokens).")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of rows.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    text: Annotated[
        Path | None,
        typer.Option(help="Folder of Python files to learn from.", show_default="the standard library"),
    ] = None,
) -> None:
    """Train the model and write it to `--out`. The defaults made the checked-in one.

    This takes about 25 minutes on two idle cores with AVX-512 bfloat16. After an interruption, the same
    command continues from the last checkpoint. A trial of one minute:

    `python -m examples.train_demo_model train --steps 20 --out /tmp/tiny --work-dir /tmp/tiny-work`

    A model of another kind, which is not checked in:

    `python -m examples.train_demo_model train --architecture gpt_neox --steps 800 --cosine-steps 1700
    --cooldown-steps 100 --out build/gpt_neox --work-dir build/gpt_neox_work`

    A larger one, on a card and with more text:

    `python -m examples.train_demo_model train --architecture llama_large --device cuda --text FOLDER
    --rows-per-step 64 --lr 6e-4 --out build/large --work-dir build/large_work`
    """
    torch.set_num_threads(threads)
    recipe = Recipe(architecture, steps, lr, warmup_steps, cosine_steps, cooldown_steps, rows_per_step, seed)
    root = text or Path(sysconfig.get_path("stdlib"))
    tokenizer, splits, digest = prepare(root)

    work_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        (work_dir / "checkpoint.safetensors").unlink(missing_ok=True)
    model = new_model(architecture, seed).to(device)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    # What a checkpoint must share with a run to be continued by it.
    identity = json.dumps({"text": digest, **asdict(recipe)}, sort_keys=True)
    fit(model, recipe, splits, work_dir, identity)

    out.mkdir(parents=True, exist_ok=True)
    console.print(f"float32 weights: perplexity {perplexity(model, splits['evaluation']):.4f}")
    save_tokenizer(tokenizer, out)
    save_data(splits, root, work_dir, out)
    save_model(model, out)
    evaluate(out, device)


@app.command()
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A model folder that holds evaluation.safetensors.", show_default="examples/demo_model"
        ),
    ] = REPOSITORY / "examples" / "demo_model",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print the perplexity of a saved model on its evaluation tokens, in bfloat16 and float32."""
    input_ids = load_file(folder / "evaluation.safetensors")["input_ids"]
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        console.print(f"saved weights in {dtype}: perplexity {perplexity(model, input_ids):.4f}")


if __name__ == "__main__":
    app()
