"""Logits, a few tokens at a time: with a large vocabulary those of a batch take more memory than the model.

The layers run on the whole batch. What follows them (lm_head, and scales or caps of some models) treats every
token alone. It runs on a few tokens, as the forward of a copy of the model: the copy shares its modules, and
has a stand-in for the layers, which gives the hidden states of these tokens. The model itself is not changed,
so other threads may use it meanwhile.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.model.architectures import ARCHITECTURES, decoder_name, is_described

PIECE = 1 << 24  # logits at a time: 64 MB in float32, of which a loss takes several copies


class Logits:
    """The logits of a batch `input_ids` [n, T], with other inputs of the model. The layers run at once.

    parts    (row, slice of its tokens), which together are the batch, in order. `of` gives the logits of one
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, **others: Any) -> None:
        self.input_ids = input_ids
        rows, length = input_ids.shape
        step, self._decoder = length, ""
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
        if input_ids.numel() * vocabulary > PIECE:
            step, self._decoder = max(1, PIECE // vocabulary), _decoder_apart(model)
        if self._decoder:
            output = model.get_submodule(self._decoder)(input_ids, **others, use_cache=False)
            self._layers, self._output = output.last_hidden_state, type(output)
            self._hidden = self._layers.detach().requires_grad_(self._layers.requires_grad)
            self._given = _Given()
            self._tail = _twin(model, self._decoder, self._given)
        else:
            self._logits = _whole(model, input_ids, others)
        self.parts = [
            (row, slice(at, min(at + step, length))) for row in range(rows) for at in range(0, length, step)
        ]

    def of(self, row: int, part: slice) -> Tensor:
        """Return the logits [t, V] of the tokens `part` of a row."""
        if not self._decoder:
            return self._logits[row, part]
        self._given.output = self._output(last_hidden_state=self._hidden[row : row + 1, part])
        return self._tail(input_ids=self.input_ids[row : row + 1, part], use_cache=False).logits[0]

    def backward(self, loss: Callable[[int, slice, Tensor], Tensor]) -> float:
        """Differentiate the sum of `loss(row, part, logits [t, V])` over all parts, and return it."""
        if not self._decoder:
            whole = torch.stack([loss(row, part, self.of(row, part)) for row, part in self.parts]).sum()
            whole.backward()
            return whole.item()
        total = 0.0
        for row, part in self.parts:
            value = loss(row, part, self.of(row, part))
            value.backward()
            total += value.item()
        self._layers.backward(self._hidden.grad)
        return total


class _Given(nn.Module):
    """Stands for the layers of a model, and returns a given output."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _twin(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return a model that shares all modules with `model`, but has `module` at `path`."""
    name, _, rest = path.partition(".")
    made: Any = copy.copy(model)
    made._modules = {**model._modules, name: _twin(getattr(model, name), rest, module) if rest else module}
    vars(made).pop("forward", None)  # accelerate sets one that is bound to the original
    return made


def _decoder_apart(model: nn.Module) -> str:
    """Return the path of the module with the layers, "" if what follows it cannot run alone."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return "" if is_described(model) or model_type not in ARCHITECTURES else decoder_name(model)


def _whole(model: nn.Module, input_ids: Tensor, others: dict[str, Any]) -> Tensor:
    if is_described(model):
        output = model(input_ids)
        logits = getattr(output, "logits", output)
    else:
        logits = getattr(model(input_ids=input_ids, **others, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError(f"{type(model).__name__} gives no logits, wanted a model with a language-model head")
    return logits
