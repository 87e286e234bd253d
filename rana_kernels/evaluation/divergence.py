"""How far the predictions of a model are from those of the dense model that it was made of.

Perplexity can fall while predictions get worse, because noise makes a model less sure, and a model that was
trained to follow instructions is too sure of itself on plain text. The divergence is 0 only for the
predictions of the dense model, so noise does not lower it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rana_kernels.model.logits import Logits
from rana_kernels.model.positions import require_ids, require_rows
from rana_kernels.system.progress import track


@dataclass(frozen=True)
class Divergence:
    """Means over all tokens of a text.

    kl       KL(dense ‖ model) of the next token, in nats
    agreed   the share of tokens for which both models think the same next token most likely
    """

    kl: float
    agreed: float


@torch.inference_mode()
def divergence(
    model: nn.Module, dense: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True
) -> Divergence:
    """Compare the predictions of both models on the sequences of `input_ids` [n, T].

    Raises ValueError for rows that are longer than the model's positions.
    """
    require_rows(model, input_ids.shape[1], "divergence: input_ids")
    require_ids(model, input_ids, "divergence: input_ids")
    kl = agreed = 0.0
    for part in track(input_ids.split(batch), "comparing predictions", progress):
        expected, found = (_logits(each, part) for each in (dense, model))
        for place in found.parts:
            p, q = expected.of(*place), found.of(*place)
            kl += kl_of(p, q)
            agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
    return Divergence(kl / input_ids.numel(), agreed / input_ids.numel())


def kl_of(dense: Tensor, model: Tensor) -> float:
    """Return the sum over tokens of the divergence of two models' logits [T, V], in nats."""
    p, q = dense.float().log_softmax(-1), model.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def _logits(model: nn.Module, input_ids: Tensor) -> Logits:
    return Logits(model, input_ids.to(next(model.parameters()).device))
