"""The model that is compressed, its texts (calibration, evaluation and prose), and a candidate made of it."""

import copy
import tempfile
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.allocation.spending import Ways
from rana_kernels.allocation.whole_model import model_curves
from rana_kernels.cli.options import Dtype, hold_out, open_model, open_tokenizer
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.compression.report import CompressReport
from rana_kernels.evaluation.density import Costs
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.model.plan import Plan
from rana_kernels.rotation import run as rotation
from rana_kernels.statistics.calibration import Stats, calibrate

BATCH = 4  # rows at a time; the logits of more rows exceed the caches
CHARACTERS = 8  # of prose a token; no tokenizer takes more
SCOPES = ("both", "mlp", "attention")


@dataclass(eq=False)
class Subject:
    """A dense model and token ids [n, T] of its texts. `prose` is another kind of text, or None."""

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
        """The curves of `global`, which serve every budget."""
        return model_curves(self.stats, progress=False)

    @cached_property
    def searched(self) -> tuple["Subject", Tensor]:
        """The subject without an eighth of its calibration text, and that eighth, for searches."""
        rest, held_out = hold_out(self.calibration)
        return replace(self, calibration=rest), held_out

    def copy(self) -> tuple[nn.Module, Stats]:
        """Return a copy of the dense model to change, and the statistics for it."""
        model = copy.deepcopy(self.dense)
        return model, replace(self.stats, model=model)

    def linears(self, scope: str) -> set[str]:
        return {name for block in self.blocks for name in scoped(block, scope)}


@cache
def rotated_subject(subject: Subject) -> Subject:
    """Return the subject with a model that `rana.rotate` has rotated. Raise ValueError if it cannot be."""
    dense = copy.deepcopy(subject.dense)
    some = some_rows(subject.calibration, rotation.TOKENS).split(BATCH)
    rotation.rotate(dense, some, progress=False)
    return replace(subject, dense=dense)


@dataclass
class Candidate:
    """A model that skips work, and the costs of its tokens.

    dense    the dense model that it was made of
    report   what `rana.compress` did, if the model has adapters
    """

    model: nn.Module
    costs: Costs
    dense: nn.Module
    report: CompressReport | None = None

    @property
    def plan(self) -> Plan | None:
        return self.report and self.report.plan


def scoped(block: Block, scope: str) -> tuple[str, ...]:
    """Return the linears of a block that a scope of `SCOPES` counts and adapts."""
    attention = tuple(filter(None, (*block.qkv, block.o)))
    mlp = tuple(filter(None, (*block.expanding, block.down)))
    return {"both": (*attention, *mlp), "mlp": mlp, "attention": attention}[scope]


def open_subject(
    model: str,
    calibration: Path | None,
    evaluation: Path | None,
    tokens: int,
    length: int,
    dtype: Dtype = Dtype.auto,
    evaluation_tokens: int | None = None,
) -> Subject:
    """Open a model and at most `tokens` tokens of each text. Cut text into rows of `length`.

    evaluation_tokens   so many of the evaluation text instead, in rows spread over it
    """
    dense, tokenizer = open_model(model, dtype).eval(), open_tokenizer(model)
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
    if evaluation_tokens is not None:
        found[1] = some_rows(found[1], evaluation_tokens)
    return Subject(Path(model).name, dense, tokenizer, *found, prose)


def documentation() -> str:
    """Return English prose that every Python carries: its language reference, as `help()` prints it."""
    return "\n".join(topics.values())


def some_rows(token_ids: Tensor, tokens: int) -> Tensor:
    """Return about so many tokens, in whole rows and at least one, spread over the text."""
    count = max(1, min(len(token_ids), tokens // token_ids.shape[1]))
    return token_ids[torch.linspace(0, len(token_ids) - 1, count).round().long()]
