"""The command `rana`: compress a model, evaluate and run what came of it, and say what runs here.

Results go to stdout (with `--json` as one JSON object), progress and errors to stderr. Exit codes: 0 for
success, 1 for a failure (one line says what to do), 2 for a command that was not understood, 130 if
interrupted. A traceback is a bug of ours.
"""

import json
import shutil
import sys
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import rich
import torch
import typer

try:
    import transformers
except ModuleNotFoundError:  # optional for the package, not for its commands
    sys.exit("rana: the commands need transformers: pip install rana_kernels[transformers]")

from rana_kernels import evaluate, info
from rana_kernels.allocate import DEFAULT, NEEDS
from rana_kernels.calibrate import calibrate
from rana_kernels.card import note
from rana_kernels.checkpoint import attached_plan, check_target, read_manifest
from rana_kernels.compress import compress as compress_model
from rana_kernels.integrations.handover import hand_over
from rana_kernels.integrations.transformers import load, save
from rana_kernels.tables import show_compression, show_evaluation, show_tuning
from rana_kernels.tokens import read_rows

app = typer.Typer(
    help="Faster transformer inference: compress a model with RaNA, then evaluate and run it.",
    epilog="Start with `rana compress --help`. Models run on the first graphics card where there is one.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

LIVE_TOKENS = 4096  # on which kept rows are counted: a mean over so many is steady


class Method(str, Enum):
    """How ranks are chosen."""

    one_budget = DEFAULT
    paper = "paper"
    static = "static"


class Dtype(str, Enum):
    """Of the weights; auto: as they are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
RowLength = Annotated[
    int, typer.Option("--sequence-length", min=2, help="Tokens in a row when the file is text.")
]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `rana compress` wrote.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (of this process, or the one given) and exit."""
    rich.reconfigure(stderr=True)  # progress bars write to this console
    transformers.utils.logging.disable_progress_bar()
    try:
        app(arguments, prog_name="rana")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"rana: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


@app.command(
    epilog="""\b
Examples:
  rana compress meta-llama/Llama-3.2-1B --calibration text.txt -o llama-rana
  rana compress ./model --calibration tokens.safetensors --flops-reduction 0.3 -o out --json
After an interruption, the same command goes on from the last finished block."""
)
def compress(
    model: Annotated[str, typer.Argument(help="A model's directory, or its name on the Hugging Face hub.")],
    calibration: Annotated[
        Path,
        typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T]: what the model reads."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    flops_reduction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the blocks' linear FLOPs to save.")
    ] = 0.44,
    method: Annotated[
        Method,
        typer.Option(
            help="global: one budget for the whole model. paper: RaNA as published. static: low rank."
        ),
    ] = Method.one_budget,
    tokens: Annotated[int, typer.Option(min=1, help="Calibrate on at most so many tokens.")] = 131_072,
    sequence_length: RowLength = 512,
    dtype: Annotated[Dtype, typer.Option(help="Load and store the weights as.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Which calibration tokens thresholds are chosen on.")] = 0,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Other text of that kind: perplexity on it, before and after, goes on the card."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace a model's linear layers by adapters that skip work, and write the result.

    A good calibration text is like what the model will read; 100,000 tokens of it are plenty.
    """
    check_target(output)
    original, tokenizer = _open_model(model, dtype), _open_tokenizer(model)
    if attached_plan(original) is not None:
        raise ValueError(f"{model} is compressed already, wanted the original model")
    rows = read_rows(
        calibration, tokenizer, original.config.vocab_size, length=sequence_length, tokens=tokens
    )
    progress = sys.stderr.isatty()
    held_out = None
    if evaluation is not None:
        held_out = read_rows(evaluation, tokenizer, original.config.vocab_size, length=sequence_length)
        dense = evaluate.perplexity(original, held_out, progress=progress).perplexity
    stats = calibrate(original, rows.split(4), seed=seed, progress=progress, **NEEDS[method.value])
    unfinished = output.resolve().with_name(f"{output.resolve().name}.resume")
    try:
        report = compress_model(
            original,
            stats=stats,
            flops_reduction=flops_reduction,
            method=method.value,
            resume_dir=unfinished,
            progress=progress,
        )
    except KeyboardInterrupt:
        print("rana: interrupted. The same command goes on from the last finished block", file=sys.stderr)
        raise
    note(original, base_model=model, calibration={"data": calibration.name})
    if held_out is not None and evaluation is not None:
        found = evaluate.perplexity(original, held_out, progress=progress).perplexity
        note(original, perplexity={"compressed": found, "dense": dense, "data": evaluation.name})
    save(original, output, tokenizer)
    shutil.rmtree(unfinished)
    stored = read_manifest(output).facts["stored_bytes"]
    if as_json:
        facts = {"directory": str(output), "tokens": stats.tokens, "stored_bytes": stored}
        _print_json({**facts, **json.loads(report.to_json())})
    else:
        show_compression(report, output, stored)


@app.command(
    "eval",
    epilog="""\b
Example:
  rana eval llama-rana --text test.txt --against meta-llama/Llama-3.2-1B
Compare perplexities only on the same file and sequence length.""",
)
def evaluate_model(
    directory: Checkpoint,
    text: Annotated[
        Path, typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T]; not the calibration.")
    ],
    against: Annotated[str | None, typer.Option(help="The dense model, to compare with.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Use at most so many tokens.")] = None,
    sequence_length: RowLength = 512,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, tokens a second and the rows that the masks keep."""
    model: Any = load(directory, device=_device())
    rows = read_rows(
        text, _open_tokenizer(directory), model.config.vocab_size, length=sequence_length, tokens=tokens
    )
    dense = None if against is None else _measure(_open_model(against, Dtype(_dtype_name(model))), rows)
    found = _measure(model, rows)
    some = rows[: max(1, LIVE_TOKENS // rows.shape[1])]
    kept = evaluate.kept_rows(model, some, progress=sys.stderr.isatty())
    plan = attached_plan(model)
    assert plan is not None, "load gives models with a plan"
    live = {name: count.mean for name, count in kept.items()}
    if as_json:
        adapters = [
            {"names": a.names, "kind": a.kind, "rank": a.rank, "planned": a.live, "kept": live[a.names[0]]}
            for a in plan.adapters
            if a.kind != "dense"
        ]
        _print_json({"model": found, "dense": dense, "adapters": adapters})
    else:
        show_evaluation(found, dense, plan, live)


@app.command(
    epilog="""\b
Example:
  rana generate llama-rana --prompt "Once upon a time" --max-new-tokens 50"""
)
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    model: Any = load(directory, device=_device())
    tokenizer = _open_tokenizer(directory)
    if tokenizer is None:
        raise ValueError(
            f"{directory} holds no tokenizer: give it to rana.save, or compress with it in place"
        )
    asked = tokenizer(prompt, return_tensors="pt").to(model.device)
    if asked["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty, wanted at least one token")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    written = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )[0, asked["input_ids"].shape[1] :]
    seconds = time.perf_counter() - started
    continuation = tokenizer.decode(written, skip_special_tokens=True)
    if as_json:
        facts = {"tokens": len(written), "tokens_per_second": len(written) / seconds}
        _print_json({"prompt": prompt, "text": continuation, **facts})
    else:
        print(prompt + continuation)


@app.command(
    "tune",
    epilog="""\b
Example:
  rana tune llama-rana --text train.txt
The table is used from then on, by every model with layers of those sizes.""",
)
def tune_kernels(
    directory: Checkpoint,
    text: Annotated[Path, typer.Option(help="Text (UTF-8), or a .safetensors with input_ids [n, T].")],
    tokens: Annotated[
        list[int], typer.Option(min=1, help="Tokens a step may have; give it several times for several.")
    ] = [1, 2, 16, 64, 512],  # noqa: B006 - typer wants a list
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file; default: where the package looks for your tables."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how the Triton kernels run fastest on this card, for the layers of a model."""
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device, and this machine has none")
    from rana_kernels.backends.triton import configurations
    from rana_kernels.backends.triton.tune import tune, write

    model: Any = load(directory, device=_device())
    length = max(tokens)
    rows = read_rows(text, _open_tokenizer(directory), model.config.vocab_size, length=length, tokens=length)
    choices = tune(model, rows[:1].to(model.device), tokens, progress=sys.stderr.isatty())
    card = configurations.card(model.device)
    write(path := output or configurations.own_table(card), card, choices)
    if as_json:
        shown = {k: c._asdict() | {"configuration": asdict(c.configuration)} for k, c in choices.items()}
        _print_json({"table": str(path), "choices": shown})
    else:
        show_tuning(choices, path)


@app.command("info")
def show_info(as_json: AsJson = False) -> None:
    """Say which backend serves each op, with what instruction set, threads and versions."""
    found = info.report()
    if as_json:
        _print_json(found.to_dict())
    else:
        print(found)


# everything after the command's name is the other program's
_UNCHANGED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("serve", context_settings=_UNCHANGED)
def serve(context: typer.Context) -> None:
    """`transformers serve`, which then finds compressed models: an OpenAI-compatible server."""
    hand_over("transformers", ["serve", *context.args], "'transformers[serving]'")


@app.command("lm-eval", context_settings=_UNCHANGED)
def lm_eval(context: typer.Context) -> None:
    """`lm-eval`, which then finds compressed models: the evaluation harness."""
    hand_over("lm-eval", context.args, "'lm-eval[hf]'")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _open_model(name: str, dtype: Dtype) -> Any:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: there is no such directory, wanted a model's")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype.value, use_safetensors=True, trust_remote_code=False
    )
    return model.to(_device())  # type: ignore[arg-type]


def _open_tokenizer(name: str | Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    # for some architectures transformers makes up an empty one where there is none
    return tokenizer if tokenizer("a", add_special_tokens=False).input_ids else None


def _measure(model: Any, rows: torch.Tensor) -> dict[str, float]:
    found = evaluate.perplexity(model, rows, progress=sys.stderr.isatty())
    half = max(1, min(64, rows.shape[1] // 2))
    return {**asdict(found), "decode_tokens_per_second": evaluate.decode_speed(model, rows[:1, :half], half)}


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))
