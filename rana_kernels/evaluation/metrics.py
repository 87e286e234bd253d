"""Measurements of a model: perplexity, live rows, tokens a second."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rana_kernels.evaluation.live import LiveCount, count_live
from rana_kernels.model.logits import Logits
from rana_kernels.model.positions import require_ids, require_rows
from rana_kernels.system.progress import track


@dataclass
class Perplexity:
    """The perplexity of a model on a text.

    perplexity          exp(nll)
    nll                 the mean negative log-likelihood of a next token, in nats
    predictions         the number of next tokens
    tokens_per_second   the speed of the whole model on batches of sequences (prefill, not decode)
    """

    perplexity: float
    nll: float
    predictions: int
    tokens_per_second: float


def perplexity(model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True) -> Perplexity:
    """Measure the T - 1 next-token predictions of each sequence of `input_ids` [n, T] independently.

    Raises ValueError for another shape, or for logits that are not finite.
    """
    started = time.perf_counter()
    losses = token_losses(model, input_ids, batch=batch, progress=progress)
    seconds = time.perf_counter() - started
    nll = float(losses.double().mean())
    return Perplexity(math.exp(nll), nll, losses.numel(), input_ids.numel() / seconds)


@torch.inference_mode()
def token_losses(model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True) -> Tensor:
    """Return the losses [n, T - 1] of the next tokens of `input_ids` [n, T], in nats, float32 on the CPU.

    Raises ValueError as `perplexity` does.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] < 2:
        raise ValueError(f"perplexity: input_ids has shape {list(input_ids.shape)}, wanted [n, T], T >= 2")
    require_rows(model, input_ids.shape[1], "perplexity: input_ids")
    require_ids(model, input_ids, "perplexity: input_ids")
    found = []
    for ids in _batches(model, input_ids, batch, "measuring perplexity", progress):
        logits = Logits(model, ids)
        for row, part in logits.parts:
            follows = ids[row, 1:][part]  # the last token of a sequence predicts nothing
            said = logits.of(row, part)[: len(follows)]
            found.append(F.cross_entropy(said.float(), follows, reduction="none").cpu())
    losses = torch.cat(found).view(len(input_ids), -1)
    if not losses.isfinite().all():
        mean = float(losses.double().mean())
        raise ValueError(f"perplexity: the mean loss is {mean}, wanted a finite number: the model is damaged")
    return losses


@torch.inference_mode()
def count_live_rows(
    model: nn.Module, input_ids: Tensor, *, batch: int = 4, progress: bool = True
) -> dict[str, LiveCount]:
    """Return the live rows of each adapter on `input_ids` [n, T], by the name of its (first) linear.

    Masks are computed twice for this. A few thousand tokens are enough for a stable mean.
    """
    require_rows(model, input_ids.shape[1], "count_live_rows: input_ids")
    with count_live(model) as counts:
        for part in _batches(model, input_ids, batch, "counting live rows", progress):
            model(input_ids=part, use_cache=False)
    return counts


@torch.inference_mode()
def decode_speed(model: nn.Module, prompt: Tensor, new_tokens: int = 64) -> float:
    """Return the tokens a second of greedy `model.generate` for one sequence, after `prompt` [1, T].

    This is the speed of a user of transformers: the time that its own code takes for each token is included.
    """
    require_rows(model, prompt.shape[1] + new_tokens, "decode_speed: the prompt with its new tokens")
    generate: Any = model.generate
    prompt = prompt.to(_device(model))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    seconds(2)  # a warm-up: first calls are slower
    return new_tokens / max(seconds(new_tokens + 1) - seconds(1), 1e-9)


def _batches(model: nn.Module, input_ids: Tensor, batch: int, what: str, progress: bool) -> Iterator[Tensor]:
    parts = input_ids.split(batch)
    for part in track(parts, what, progress):
        yield part.to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
