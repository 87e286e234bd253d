"""Train the small Llama model in `examples/demo_model/` on the source of Python's standard library,
or, with `--architecture gpt_neox`, a model of another kind on the same text.

The text is on every machine that can run this script, so nothing is downloaded. The path through
the file is the path of the work: read and split the text, train a tokenizer, pack tokens into rows,
train, measure, save. Letters: V vocabulary size, T row length in tokens, n rows.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

REPOSITORY = Path(__file__).resolve().parent.parent
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
ROW = 512
SHORT_ROW = 256
HELD_OUT_ROWS = 256

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


# ---------------------------------------------------------------------------------------------
# Text: which files, and which split each belongs to
# ---------------------------------------------------------------------------------------------

# Installed packages differ between machines; the others are tables written by programs, where
# a low perplexity would say nothing about the model.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "encoded_modules", "__pycache__"}
SKIPPED_PREFIXES = ("lib2to3/tests/data/", "config-", "_sysconfigdata")
LARGEST_FILE = 200_000  # bytes; one larger file would be most of a held-out split
HELD_OUT_SHARE = 0.03  # of the files, for each of evaluation and calibration


def library_files(root: Path) -> Iterator[str]:
    """Yield the paths, relative to `root` and sorted, of the source files worth reading."""
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        skipped = SKIPPED_FOLDERS.intersection(path.split("/")) or path.startswith(SKIPPED_PREFIXES)
        if not skipped and (root / path).stat().st_size <= LARGEST_FILE:
            yield path


def read_library(root: Path) -> dict[str, str]:
    """Return {relative path: text} for every file under `root` that is valid UTF-8."""
    texts = {}
    for path in library_files(root):
        try:
            texts[path] = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def path_hash(path: str) -> float:
    """Map a relative path to [0, 1): the first 8 bytes of its SHA-256, over 2**64."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def split_of(path: str) -> str:
    """Name the split of a file. It depends on the path alone, so an edit moves nothing."""
    position = path_hash(path)
    if position < HELD_OUT_SHARE:
        return "evaluation"
    if position < 2 * HELD_OUT_SHARE:
        return "calibration"
    return "training"


def split_library(texts: dict[str, str]) -> dict[str, list[str]]:
    """Deal the texts to the three splits, in order of path hash: any prefix is a fair sample."""
    splits: dict[str, list[str]] = {"training": [], "calibration": [], "evaluation": []}
    for path in sorted(texts, key=path_hash):
        splits[split_of(path)].append(texts[path])
    return splits


def corpus_digest(texts: dict[str, str]) -> str:
    """Return the SHA-256 (hex) of all paths and texts: equal digests mean equal training text."""
    digest = hashlib.sha256()
    for path, text in texts.items():
        digest.update(f"{path}\0{text}\0".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with V = 4096; byte level, so no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Join the texts, an end-of-text token after each, and cut them to int32 rows [n, 512]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream += [*encoding.ids, end]
    rows = len(stream) // ROW
    return torch.tensor(stream[: rows * ROW], dtype=torch.int32).view(rows, ROW)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for AutoTokenizer."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=ROW,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # transformers 5 writes its own name for the class, which transformers 4 cannot load.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# Model and optimizer
# ---------------------------------------------------------------------------------------------


class Architecture(str, Enum):
    """What is trained: 5.4 million parameters of Llama, 91 (on a card), or 3.5 of GPT-NeoX."""

    llama = "llama"
    llama_large = "llama_large"
    gpt_neox = "gpt_neox"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the text."""

    architecture: Architecture
    steps: int
    learning_rate: float
    warmup_steps: int
    cosine_steps: int
    cooldown_steps: int
    rows_per_step: int
    seed: int


def new_model(architecture: Architecture, seed: int) -> PreTrainedModel:
    """Build a model with random float32 weights and tied embeddings."""
    torch.manual_seed(seed)
    if architecture is Architecture.gpt_neox:
        return new_gpt_neox()
    return new_llama(SIZES[architecture])


# of the configuration of every architecture
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": ROW,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


SIZES = {
    Architecture.llama: {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    Architecture.llama_large: {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}


def new_llama(sizes: dict[str, int]) -> LlamaForCausalLM:
    """Gated MLPs, grouped-query attention, no biases."""
    return LlamaForCausalLM(LlamaConfig(**sizes, **SHARED))


def new_gpt_neox() -> GPTNeoXForCausalLM:
    """MLPs of GELU without gates, fused qkv, biases, attention and MLP side by side: as in Pythia."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=6,
            **SHARED,
        )
    )


def new_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves the gains of the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def cooldown_start(recipe: Recipe) -> int:
    """Return the step from which the rate falls to zero and rows have their full length."""
    return max(0, recipe.steps - recipe.cooldown_steps)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate at `step` (from 0): a linear warm-up, a cosine, a linear fall to zero.

    The cosine has a length of its own, so a run may be made shorter or longer by moving only its
    end: what was trained before the fall stays valid.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.cosine_steps - recipe.warmup_steps)
    rate = recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    left = (recipe.steps - step) / max(1, recipe.cooldown_steps)
    return rate * min(left, 1.0)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def step_rows(recipe: Recipe, rows: Tensor, step: int) -> Tensor:
    """Return the rows of one step, int64 [n, T], from the training rows [total, 512].

    Each pass over the text has its own order, found from the seed and the step alone, so that a
    resumed run needs no data-loader state. Steps before the cooldown cut each row in two:
    attention over short rows is cheaper, and the rest is enough to learn the long positions.
    """
    steps_per_pass = len(rows) // recipe.rows_per_step
    this_pass, place = divmod(step, steps_per_pass)
    generator = torch.Generator().manual_seed(recipe.seed + this_pass)
    order = torch.randperm(len(rows), generator=generator)
    chosen = rows[order[place * recipe.rows_per_step :][: recipe.rows_per_step]].long()
    return chosen.view(-1, SHORT_ROW) if step < cooldown_start(recipe) else chosen


def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the losses in nats, float32 [n * (T - 1)], of predicting each next token of [n, T]."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")


def rows_at_once(model: PreTrainedModel) -> int:
    """Few on a CPU: the logits of more fall out of its caches."""
    return 4 if model.device.type == "cpu" else 64


def train_step(model: PreTrainedModel, optimizer: torch.optim.AdamW, input_ids: Tensor, rate: float) -> float:
    """Take one optimizer step on `input_ids` [n, T]; return the mean loss in nats a token."""
    total = torch.zeros((), device=model.device)
    for part in input_ids.to(model.device).split(rows_at_once(model)):
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = token_losses(model, part).mean() * (len(part) / len(input_ids))
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Return exp(mean next-token loss) over the T - 1 predictions of each row of [n, T].

    A row sees nothing of the rows before it. The losses are added in float64.
    """
    parts = input_ids.to(model.device).split(rows_at_once(model))
    losses = [token_losses(model, part.long()).double() for part in parts]
    return torch.cat(losses).mean().exp().item()


# ---------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file, replaced whole, so an interruption leaves the last good one
# ---------------------------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    step: int,
    seconds: float,
    identity: str,
) -> None:
    """Write weights, both AdamW moments, steps done and seconds spent. `identity`: see `train`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    metadata = {"step": str(step), "seconds": str(seconds), "identity": identity}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, identity: str
) -> tuple[int, float]:
    """Restore model and optimizer in place; return (steps done, seconds spent), or (0, 0.0)."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if metadata["identity"] != identity:
        raise typer.BadParameter(
            f"{path} is from other settings or other text; pass --fresh to discard it, "
            "or another --work-dir to keep both"
        )
    tensors = load_file(path, device=str(model.device))
    step = int(metadata["step"])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight.{name}"])
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=model.device), **state}
    return step, float(metadata["seconds"])


# ---------------------------------------------------------------------------------------------
# Log
# ---------------------------------------------------------------------------------------------


@dataclass
class LogLine:
    """One line of training_log.csv; `loss` is in nats a token, `seconds` counts training only."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    seconds: float
    eval_perplexity: float | None = None

    def cells(self) -> list[str]:
        """Return the line as text, the perplexity empty where it was not measured."""
        perplexity = "" if self.eval_perplexity is None else f"{self.eval_perplexity:.4f}"
        numbers = [f"{self.loss:.4f}", f"{self.learning_rate:.3e}", f"{self.seconds:.1f}"]
        return [str(self.step), str(self.tokens), *numbers, perplexity]


def restart_log(path: Path, step: int) -> None:
    """Write the header, and keep of an earlier log only the lines up to `step`."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [line for line in list(csv.reader(file))[1:] if int(line[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[field.name for field in fields(LogLine)], *kept])


def append_log(path: Path, line: LogLine) -> None:
    """Add one line to the log."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(line.cells())


# ---------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------

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
    model: PreTrainedModel,
    recipe: Recipe,
    splits: dict[str, Tensor],
    work_dir: Path,
    identity: str,
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
    architecture: Annotated[Architecture, typer.Option(help="What to train.")] = Architecture.llama,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the finished model.", show_default="examples/demo_model"),
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
            min=0,
            help="Last steps, with a rate falling to zero and rows of 512 tokens (before: 256).",
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

    About 25 minutes on two idle cores with AVX-512 bfloat16. Interrupt it at will: the same command
    continues from the last checkpoint. To try the machinery in a minute:

    `python examples/train_demo_model.py train --steps 20 --out /tmp/tiny --work-dir /tmp/tiny-work`

    A model of another kind, which is not checked in:

    `python examples/train_demo_model.py train --architecture gpt_neox --steps 800 --cosine-steps 1700
    --cooldown-steps 100 --out build/gpt_neox --work-dir build/gpt_neox_work`

    A larger one, on a card and with more text:

    `python examples/train_demo_model.py train --architecture llama_large --device cuda --text FOLDER
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
            help="A model folder that holds evaluation.safetensors.",
            show_default="examples/demo_model",
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
