"""Places in a text where a compressed model does something worth looking at, with the words around them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONTEXT = 12  # tokens shown before the one that is predicted


@dataclass
class Example:
    """The prediction of token `position` + 1 of a row, from those before.

    text, next   the last tokens read, and the one to be predicted; ids where there is no tokenizer
    cost_ratio   cost of the token that was read last, as a fraction of the dense cost
    loss         of the prediction, in nats, and `dense_loss` the dense model's, if it was given
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
    """What is known of every prediction: token_ids [n, T] · cost_ratio and losses [n, T - 1] · dense likewise."""

    token_ids: Tensor
    cost_ratio: Tensor
    losses: Tensor
    dense: Tensor | None
    tokenizer: Any

    def where_most(self, values: Tensor, count: int) -> list[Example]:
        """The spots of the `count` largest of `values` [n, T - 1], largest first."""
        places = values.flatten().topk(min(count, values.numel())).indices.tolist()
        return [self._spot(*divmod(place, values.shape[1])) for place in places]

    def _spot(self, row: int, position: int) -> Example:
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
    """[n, T - 1] float64, from `cost_ratio` [n·T] of every token: the last of a row predicts nothing."""
    return torch.as_tensor(cost_ratio).view(token_ids.shape)[:, :-1]
