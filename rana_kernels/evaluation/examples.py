"""Examples of predictions in a text, such as those of most cost or loss, with the words before them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONTEXT = 12  # tokens shown before the one that is predicted


@dataclass
class Example:
    """The prediction of token `position` + 1 of sequence `row` from the tokens before it.

    text         the last tokens before it, as ids if there is no tokenizer
    next         the predicted token, likewise
    cost_ratio   the cost of the last token before it, as a fraction of the dense cost
    loss         the loss of the prediction, in nats
    dense_loss   the loss of the dense model, or None if it was not measured
    """

    row: int
    position: int
    text: str
    next: str
    cost_ratio: float
    loss: float
    dense_loss: float | None


@dataclass
class Predictions:
    """The measurements of all predictions of a text.

    token_ids    [n, T]
    cost_ratio   [n, T - 1]
    losses       [n, T - 1]
    dense        the losses of the dense model [n, T - 1], or None
    tokenizer    None: examples show ids
    """

    token_ids: Tensor
    cost_ratio: Tensor
    losses: Tensor
    dense: Tensor | None
    tokenizer: Any

    def where_most(self, values: Tensor, count: int) -> list[Example]:
        """Return the examples of the `count` largest `values` [n, T - 1], largest first."""
        places = values.flatten().topk(min(count, values.numel())).indices.tolist()
        return [self._example(*divmod(place, values.shape[1])) for place in places]

    def _example(self, row: int, position: int) -> Example:
        ids = self.token_ids[row]
        return Example(
            row=row,
            position=position,
            text=self._words(ids[max(0, position + 1 - CONTEXT) : position + 1]),
            next=self._words(ids[position + 1 : position + 2]),
            cost_ratio=float(self.cost_ratio[row, position]),
            loss=float(self.losses[row, position]),
            dense_loss=None if self.dense is None else float(self.dense[row, position]),
        )

    def _words(self, ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist())) if self.tokenizer is None else self.tokenizer.decode(ids)


def costs_of_predictions(cost_ratio: Tensor, token_ids: Tensor) -> Tensor:
    """Return [n, T - 1] of `cost_ratio` [n·T]: the last token of a sequence predicts nothing."""
    return torch.as_tensor(cost_ratio).view(token_ids.shape)[:, :-1]
