"""One model decoding: a prompt, then token after token, greedily, through a static cache."""

import gc
import inspect
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.codecache import PyCodeCache
from transformers import PreTrainedModel, StaticCache

from rana_kernels.system.cpu import clock

WRITTEN = "torch._inductor.runtime.compile_tasks."  # names of modules that torch.compile writes
WARM_UP = 2  # steps before one is captured: they compile, and show that they need not compile again


class Decoder:
    """Everything that one model needs to go on from its last tokens. The same for every contender.

    step     what computes the logits of one more token: the model's forward, or that compiled
    graphs   whether steps are replays of a CUDA graph, as they are on a card
    """

    def __init__(self, model: PreTrainedModel, batch: int, room: int, step: Callable | None = None) -> None:
        self.model, self.batch, self.step = model, batch, step or model.forward
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        # the argument's name since transformers 5.24, and before
        known = "cache" in inspect.signature(model.forward).parameters
        self._cached = {"cache" if known else "past_key_values": self.cache}
        self.last: Tensor = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.graphs = model.device.type == "cuda"
        self._computed = 0
        self._replay: Callable[[], None] | None = None

    def read(self, prompt: Tensor) -> float:
        """Seconds from the prompt [batch, T] to the first new token.

        lm_head is called here and not by the model, which would give it a view of the last hidden state
        in three dimensions: in 16 bits on the CPU, torch then copies the whole weight before it multiplies.
        """
        self.cache.reset()
        begin = self._clock()
        hidden = self.model.base_model(input_ids=prompt, use_cache=True, **self._cached)[0]
        self.last.copy_(self.model.get_output_embeddings()(hidden[:, -1]).argmax(-1, keepdim=True))
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
            self._next()
        return (self._clock() - begin) / tokens

    def _next(self) -> None:
        if self.graphs and self._computed == WARM_UP:
            self._replay = captured(self._compute)
        (self._replay or self._compute)()

    def _compute(self) -> None:
        self._computed += 1
        output = self.step(input_ids=self.last, use_cache=True, **self._cached)
        self.last.copy_(output.logits.argmax(-1))

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            return time.perf_counter()
        return clock(torch.get_num_threads())()


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what `run` does. That is not done yet: calling what is returned does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compiled(model: PreTrainedModel) -> Callable:
    """One step of `model`, compiled whole.

    On a processor torch is told, for the whole process, that weights are constants: it then brings those of
    dense linears into oneDNN's layout, in which one token takes little more than half of the time.
    """
    inductor.freezing = model.device.type == "cpu"
    return torch.compile(model.forward, fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    """Drop what was compiled before, and the packed weights with it: torch keeps the modules that it wrote.

    A function may also be compiled for a few sizes only, and then runs eagerly without a word.
    """
    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    for name in [name for name in sys.modules if name.startswith(WRITTEN)]:
        del sys.modules[name]
    gc.collect()
