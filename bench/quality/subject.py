"""The model that is compressed, and its texts: what it is calibrated on, measured on, and another kind."""

import copy
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.allocation.spending import Ways
from rana_kernels.allocation.whole_model import model_curves
from rana_kernels.cli.options import Dtype, hold_out, open_model, open_tokenizer
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.statistics.calibration import Stats, calibrate

BATCH = 4  # rows at a time: the logits of more fall out of the caches
CHARACTERS = 8  # of prose for a token: more than any tokenizer takes
SCOPES = ("both", "mlp", "attention")


@dataclass
class Subject:
    """A dense model and rows of tokens [n, T]. `prose`: of another kind than the other two, or None."""

    name: str
    dense: Any
    tokenizer: Any
    calibration: Tensor
    evaluation: Tensor
    prose: Tensor | None = None

    @cached_property
    def blocks(self) -> list[Block]:
        return find_blocks(self.dense)

    @cached_property
    def stats(self) -> Stats:
        return calibrate(self.dense, self.calibration.split(BATCH), progress=False)

    @cached_property
    def curves(self) -> list[Ways]:
        """What every multiply-add is worth: serves every budget of `global`."""
        return model_curves(self.stats, progress=False)

    @cached_property
    def searched(self) -> tuple["Subject", Tensor]:
        """The subject with an eighth of its calibration text held out, and that: for what measures."""
        rows, held_out = hold_out(self.calibration)
        return replace(self, calibration=rows), held_out

    def copy(self) -> tuple[nn.Module, Stats]:
        """A dense model to be changed, and the statistics as its own."""
        model = copy.deepcopy(self.dense)
        return model, replace(self.stats, model=model)

    def linears(self, scope: str) -> set[str]:
        return {name for block in self.blocks for name in scoped(block, scope)}


def scoped(block: Block, scope: str) -> tuple[str, ...]:
    """The linears of a block that a scope of `SCOPES` counts and adapts."""
    attention = tuple(filter(None, (*block.qkv, block.o)))
    mlp = tuple(filter(None, (*block.expanding, block.down)))
    return {"both": (*attention, *mlp), "mlp": mlp, "attention": attention}[scope]


def open_subject(
    model: str, calibration: Path | None, evaluation: Path | None, tokens: int, length: int
) -> Subject:
    """At most `tokens` tokens of each text, text cut into rows of `length`. Raises as the commands do."""
    dense, tokenizer = open_model(model, Dtype.auto).eval(), open_tokenizer(model)
    vocabulary = dense.config.vocab_size

    def read(path: Path) -> Tensor:
        return read_token_ids(path, tokenizer, vocabulary, length=length, tokens=tokens)

    found = [
        read(given or Path(model) / f"{name}.safetensors")
        for name, given in (("calibration", calibration), ("evaluation", evaluation))
    ]
    prose = None
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "topics.txt"
            path.write_text(documentation()[: CHARACTERS * tokens], encoding="utf-8")
            prose = read(path)
    return Subject(Path(model).name, dense, tokenizer, *found, prose)


def documentation() -> str:
    """English prose that every Python has: its language reference, as `help()` prints it."""
    return "\n".join(topics.values())


def some_rows(rows: Tensor, tokens: int) -> Tensor:
    """About so many tokens, in whole rows and at least one, spread over the text."""
    count = max(1, min(len(rows), tokens // rows.shape[1]))
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
