"""What the commands share: their app and options, opening a model and its tokenizer, JSON on stdout."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor

HELD_OUT = 8  # where something is measured on the way, one row in so many is for that

app = typer.Typer(
    help="Faster transformer inference: compress a model with RaNA, then evaluate and run it.",
    epilog="Start with `rana compress --help`. Models run on the first graphics card where there is one.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# of commands whose arguments are another program's, all of them
UNCHANGED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


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
SearchHistory = Annotated[
    Path | None,
    typer.Option(
        "--history", help="Where searches are kept, to learn from; default: in your data directory."
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `rana compress` wrote.")]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def open_model(name: str, dtype: Dtype) -> Any:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: there is no such directory, wanted a model's")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype.value, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device())  # type: ignore[arg-type]


def hold_out(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(Every row but one in eight, the ones left out.) ValueError for too few."""
    chosen = torch.arange(len(token_ids)) % HELD_OUT == HELD_OUT - 1
    if not chosen.any():
        raise ValueError(
            f"the text has {len(token_ids)} rows, wanted at least {HELD_OUT}: one in so many is held out to "
            "measure on"
        )
    return token_ids[~chosen], token_ids[chosen]


def open_tokenizer(name: str | Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
    # for some architectures transformers makes up an empty one where there is none
    return tokenizer if tokenizer("a", add_special_tokens=False).input_ids else None


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))
