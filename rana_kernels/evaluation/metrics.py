"""What a model is worth and what it takes: perplexity, rows that the masks keep, tokens a second."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from rana_kernels.evaluation.live import LiveCount, count_live


@dataclass
class Perplexity:
    """`nll`: mean negative log-likelihood in nats of `predictions` next tokens; `perplexity`: its exp.

    tokens_per_second   through the whole model, a batch of whole rows at a time (prefill, not decode)
    """

    perplexity: float
    nll: float
    predictions: int
    tokens_per_second: float


def perplexity(model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True) -> Perplexity:
    """Over the T - 1 next-token predictions of each row of `input_ids` [n, T]; rows do not see each other.

    Raises ValueError for another shape, or for logits that are not finite.
    """
    started = time.perf_counter()
    losses = token_losses(model, input_ids, batch=batch, progress=progress)
    seconds = time.perf_counter() - started
    nll = float(losses.double().mean())
    return Perplexity(math.exp(nll), nll, losses.numel(), input_ids.numel() / seconds)


@torch.inference_mode()
def token_losses(model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True) -> Tensor:
    """[n, T - 1] float32 on the CPU: what each next token of each row of `input_ids` [n, T] costs, in nats.

    Raises as `perplexity` does.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] < 2:
        raise ValueError(f"perplexity: input_ids has shape {list(input_ids.shape)}, wanted [n, T], T >= 2")
    found = []
    for part in _batches(model, input_ids, batch, "measuring perplexity", progress):
        logits = model(input_ids=part, use_cache=False).logits
        # a row at a time: in float32 the logits of a batch can be larger than the model
        found += [
            F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").cpu()
            for row, ids in zip(logits, part, strict=True)
        ]
    losses = torch.stack(found)
    if not losses.isfinite().all():
        mean = float(losses.double().mean())
        raise ValueError(f"perplexity: the mean loss is {mean}, wanted a finite number: the model is damaged")
    return losses


@torch.inference_mode()
def count_live_rows(
    model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True
) -> dict[str, LiveCount]:
    """Rows that each adapter keeps on `input_ids` [n, T], by the name of its (first) linear.

    The masks are computed twice for it: a few thousand tokens are enough for a steady mean.
    """
    with count_live(model) as counts:
        for part in _batches(model, input_ids, batch, "counting kept rows", progress):
            model(input_ids=part, use_cache=False)
    return counts


@torch.inference_mode()
def decode_speed(model: nn.Module, prompt: Tensor, new_tokens: int = 64) -> float:
    """Tokens a second of `model.generate`, greedy, one sequence, after `prompt` [1, T] has been read.

    What a user of transformers gets: its own work for each token is in it.
    """
    generate: Any = model.generate
    prompt = prompt.to(_device(model))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    seconds(2)  # what happens only once happens here
    return new_tokens / max(seconds(new_tokens + 1) - seconds(1), 1e-9)


def _batches(model: nn.Module, input_ids: Tensor, batch: int, what: str, progress: bool) -> Iterator[Tensor]:
    parts = input_ids.split(batch)
    for part in track(parts, what, disable=not progress, transient=True):
        yield part.to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
