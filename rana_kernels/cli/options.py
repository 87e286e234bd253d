"""The parts that the commands share: the app, common options, opening a model and its tokenizer, output."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from safetensors import SafetensorError
from torch import Tensor

from rana_kernels.checkpoint.budget import set_budget
from rana_kernels.checkpoint.replacement import check_target
from rana_kernels.cli.originals import check_weights, first_sentence, read_config
from rana_kernels.integrations.decoding import quicken
from rana_kernels.integrations.transformers import load
from rana_kernels.model.architectures import known_architecture
from rana_kernels.model.head import output_head
from rana_kernels.model.quantized import QUANT_METHOD, quantization_of, refuse_quantized_config
from rana_kernels.system.files import check_writable

HELD_OUT = 8  # one sequence of so many is held out for measurements
GGUF_PACKAGES = ("gguf", "accelerate")  # what transformers needs to read a GGUF file

app = typer.Typer(
    help="Faster transformer inference: compress a model with RaNA, then evaluate and run it.",
    epilog="Start with `rana compress --help`. Models run on the first graphics card, if there is one.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def begin(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure: rana --debug COMMAND …")
    ] = False,
) -> None:
    """Read the options in front of the command. `main` has looked for --debug itself."""


# the settings of a command that passes all its arguments to another program
UNCHANGED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Dtype(str, Enum):
    """The dtype of the weights. With `auto`, it is the dtype in the files."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


class Bits(str, Enum):
    """The bits of a weight. With 16, it has the dtype of the model. auto: a choice for every linear."""

    sixteen = "16"
    eight = "8"
    four = "4"
    auto = "auto"

    @property
    def number(self) -> int | str:
        """As in `rana_kernels.compress`: a number, or "auto"."""
        return self.value if self is Bits.auto else int(self.value)


class Group(str, Enum):
    """The columns of a weight that share a scale."""

    thirty_two = "32"
    sixty_four = "64"
    hundred_and_twenty_eight = "128"
    row = "row"

    @property
    def columns(self) -> int | None:
        """As in `rana_kernels.compress`: None for a whole row."""
        return None if self is Group.row else int(self.value)


SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=2,
        help="Cut text into sequences of this many tokens. Unused for token ids.",
        show_default="512, or what the model takes",
    ),
]
SearchHistory = Annotated[
    Path | None,
    typer.Option(
        "--history",
        help="Directory of earlier searches. A search learns from them and adds its own measurements. "
        "Default: in your data directory.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="RATIO",
        help="Set the masks so that this share of the multiply-adds of the blocks' linears is left. `rana "
        "info DIR` says what is in reach. Default: as compressed.",
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `rana compress` wrote.")]


def device() -> str:
    """Return the device that the commands run models on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name(model: Any) -> str:
    """Return the dtype of a model's weights as `Dtype` names it."""
    return str(model.dtype).removeprefix("torch.")


def open_model(name: str, dtype: Dtype) -> Any:
    """Load a dense model from a directory, a GGUF file or the hub, in floats.

    Raises FileNotFoundError for a missing directory or file, ImportError for a GGUF file if the packages that
    read it are missing, and ValueError for a model that cannot be read or lacks weights of a causal one.
    """
    source = source_of(name)
    if "gguf_file" in source:
        source |= _dequantizing()
    else:
        source["use_safetensors"] = True
        read_config(name)
        check_weights(name)
    try:
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=dtype.value, trust_remote_code=False, output_loading_info=True
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{name}: the weights cannot be read ({first_sentence(error)}), wanted whole safetensors files"
        ) from None
    model, found = opened
    if found["missing_keys"]:  # transformers makes them of random numbers
        what = (getattr(model.config, "architectures", None) or ["model"])[0]
        raise ValueError(
            f"{name} has a {what} without {min(found['missing_keys'])}, wanted a model that writes text"
        )
    return model.to(device())


def open_compressed(directory: Path, budget: float | None = None) -> Any:
    """Load a compressed model, with its masks at `budget` if there is one.

    Raises ValueError if it makes no logits or cannot serve the budget, and CheckpointError as `load` does.
    """
    model = load(directory, device=device())
    if budget is not None:
        set_budget(model, budget)
    if output_head(model) is None:
        raise ValueError(f"{directory} holds a {type(model).__name__}, wanted a model with an lm_head")
    return model


def quicken_or_say(model: Any) -> None:
    """Give the model its fast step of generation, or say on stderr why transformers' own remains."""
    try:
        quicken(model)
    except ValueError as error:
        print(f"rana: tokens are decoded by transformers' own step: {error}", file=sys.stderr)


def refuse_compressed(name: str) -> None:
    """Raise ValueError, before any weight is read, if the config says that a model cannot be compressed."""
    source = source_of(name)
    if "gguf_file" in source:  # it is read in floats, whatever it stores
        return
    config = read_config(name)
    if quantization_of(config).get("quant_method") == QUANT_METHOD:
        raise ValueError(f"{name} is compressed already, wanted the original model")
    refuse_quantized_config(name, config)
    known_architecture(name, config.model_type)


def source_of(name: str | Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a model is.

    Raises FileNotFoundError and ImportError like `open_model`.
    """
    path = Path(name)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{name}: there is no such file, wanted a model in GGUF")
        missing = [package for package in GGUF_PACKAGES if find_spec(package) is None]
        if missing:
            raise ImportError(
                f"{name}: a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}"
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if str(name).startswith((".", "/", "~")) and not path.is_dir():
        raise FileNotFoundError(f"{name}: there is no such directory, wanted a model's")
    return {"pretrained_model_name_or_path": str(name)}


def _dequantizing() -> dict[str, Any]:
    """Return the arguments that make transformers read a GGUF file as floats. Older versions always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def hold_out(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (token ids to work on, token ids held out): every eighth sequence is held out.

    Raises ValueError for fewer than eight sequences.
    """
    held_out = torch.arange(len(token_ids)) % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        raise ValueError(
            f"the text has {len(token_ids)} sequences, wanted at least {HELD_OUT}, because one of {HELD_OUT} "
            "is held out for measurements: give more text"
        )
    return token_ids[~held_out], token_ids[held_out]


def check_output(output: Path) -> None:
    """Raise OSError if `output`, or the unfinished work on it, cannot be written."""
    check_target(output)
    check_writable(_unfinished(output))


def _unfinished(output: Path) -> Path:
    return output.resolve().with_name(f"{output.resolve().name}.resume")


@contextmanager
def unfinished_work(output: Path) -> Iterator[Path]:
    """Give the directory for unfinished work on `output`. Delete it if the block ends without an error."""
    place = _unfinished(output)
    try:
        yield place
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        what = (
            "interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped, {place} keeps what is done"
        )
        print(f"rana: {what}. The same command goes on where this one stopped", file=sys.stderr)
        raise
    shutil.rmtree(place)


def open_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a model. Return None if the model has none."""
    source = source_of(name)
    if "gguf_file" in source:
        return _open_gguf_tokenizer(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    # for some architectures transformers makes an empty tokenizer if the model has none
    return tokenizer if tokenizer("a", add_special_tokens=False).input_ids else None


def _open_gguf_tokenizer(source: dict[str, Any]) -> Any:
    """Load the tokenizer in a GGUF file. If it cannot be read, say why on stderr and return None."""
    try:
        return transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:  # each version of transformers has errors of its own for what it does not know
        version, reason = transformers.__version__, f"{type(error).__name__}: {error}"
        print(
            f"rana: warning: transformers {version} reads no tokenizer from {source['gguf_file']} ({reason})",
            file=sys.stderr,
        )
        return None


def print_json(data: dict[str, Any]) -> None:
    """Print a JSON object on stdout."""
    print(json.dumps(data, indent=1, allow_nan=False))
