"""One model decoding: a prompt, then token after token, greedily, through a static cache."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


class Decoder:
    """Everything that one model needs to go on from its last tokens. The same for every contender.

    step   what computes the logits of one more token: the model's forward, or that compiled
    """

    def __init__(self, model: PreTrainedModel, batch: int, room: int, step: Callable | None = None) -> None:
        self.model, self.batch, self.step = model, batch, step or model.forward
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.last: Tensor = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def read(self, prompt: Tensor) -> float:
        """Seconds from the prompt [batch, T] to the first new token."""
        self.cache.reset()
        begin = self._clock()
        self._advance(self.model.forward, prompt)
        return self._clock() - begin

    def pretend(self, length: int) -> None:
        """Stand behind a prompt of `length` tokens that was never read: keys and values are random."""
        self.read(self.last)
        for layer in self.cache.layers:
            layer.keys[:, :, :length].normal_()
            layer.values[:, :, :length].normal_()
            layer.cumulative_length.fill_(length)

    def decode(self, tokens: int) -> float:
        """Seconds a step, each with a new token for every row of the batch, over `tokens` of them."""
        begin = self._clock()
        for _ in range(tokens):
            self._advance(self.step, self.last)
        return (self._clock() - begin) / tokens

    def _advance(self, forward: Callable, ids: Tensor) -> None:
        output = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = output.logits[:, -1:].argmax(-1)

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def compiled(model: PreTrainedModel) -> Callable:
    """One step of `model`, compiled whole; on a card inside a CUDA graph."""
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    return torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)
