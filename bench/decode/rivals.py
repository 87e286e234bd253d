"""Whole programs beside what people use: `python -m bench.decode MODEL --rivals llama.cpp`.

All contenders have the weights of one model, and each writes the same number of tokens after the same prompt,
by its own program: `generate` of transformers, or llama.cpp's server. Contenders of 16, 8 and 4 bits are
loaded one width after the other, and those of one width take turns. Seconds are by the clock, so other work
on the machine spoils them.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import rana_kernels as rana
from bench.decode import widths
from bench.decode.gguf_files import matrix_bytes, round_like, write_gguf
from bench.decode.llama_cpp import LlamaCpp
from bench.decode.models import twin
from bench.decode.steps import Decoder, compiled, forget_compiled
from bench.kernels.timing import summary, using
from bench.report.programs import RANDOM
from bench.report.results import Row
from rana_kernels.evaluation.metrics import perplexity
from rana_kernels.statistics.calibration import Stats

RIVALS = {"llama.cpp": "xllamacpp", "torchao": "torchao"}  # and the packages that hold them
WIDTHS = {16: "BF16", 8: "Q8_0", 4: "Q4_0"}  # the bits of a weight, and llama.cpp's name
RATIOS = (0.8, 0.7, 0.56)
Write = Callable[[list[int], int], tuple[float, float]]  # seconds to the first token, and of each further one


@dataclass(frozen=True)
class Contender:
    """A model in a program. `start` gives, for a number of threads, the function that writes."""

    name: str
    bits: int
    cost_ratio: float
    read: int
    stored: int
    perplexity: object
    start: Callable[[int], Any]


def check(rivals: list[str]) -> None:
    """Raise ValueError for an unknown rival, and ImportError for one that is not installed."""
    for rival in rivals:
        if rival not in RIVALS:
            raise ValueError(f"--rivals has {rival!r}, wanted one of {', '.join(RIVALS)}")
        if find_spec(RIVALS[rival]) is None:
            raise ImportError(f"{rival} is not installed: pip install {RIVALS[rival]}")


def compare(
    model: PreTrainedModel, texts: dict[str, Tensor], rivals: list[str], threads: list[int],
    prompts: list[int], tokens: int, rounds: int,
) -> Iterator[Row]:  # fmt: skip
    """Yield a row for each contender, number of threads and length of a prompt.

    texts   `calibration` and `evaluation` [n, T] of a trained model; empty for random weights
    """
    ids = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in prompts]
    stats = rana.calibrate(model, texts["calibration"].split(8)) if texts else None
    with TemporaryDirectory() as folder:
        for bits in WIDTHS:
            contenders = list(_contenders(model, texts.get("evaluation"), stats, rivals, bits, Path(folder)))
            for count, prompt in product(threads, ids):
                yield from _take_turns(contenders, count, prompt, tokens, rounds)


def _take_turns(
    contenders: list[Contender], threads: int, prompt: list[int], tokens: int, rounds: int
) -> Iterator[Row]:
    with using(threads), ExitStack() as open_ones:
        forget_compiled()
        writers = [open_ones.enter_context(contender.start(threads)) for contender in contenders]
        found: list[list[tuple[float, float]]] = [[] for _ in contenders]
        for _ in range(1 + rounds):  # the first round warms up, or compiles
            for seconds, write in zip(found, writers, strict=True):
                seconds.append(write(prompt, tokens))
        for contender, seconds in zip(contenders, found, strict=True):
            first, each = (summary(list(values)) for values in zip(*seconds[1:], strict=True))
            yield {
                "contender": contender.name, "bits": contender.bits, "cost_ratio": contender.cost_ratio,
                "prompt": len(prompt), "threads": threads, "first_token_ms": round(first.median / 1e3, 1),
                "tokens_per_s": round(1e6 / each.median, 2), "p20": round(1e6 / each.p80, 2),
                "p80": round(1e6 / each.p20, 2), "bytes_read_per_token": contender.read,
                "bytes_stored": contender.stored, "perplexity": contender.perplexity,
            }  # fmt: skip


def _contenders(
    model: PreTrainedModel, text: Tensor | None, stats: Stats | None, rivals: list[str], bits: int,
    folder: Path,
) -> Iterator[Contender]:  # fmt: skip
    def quality(made: PreTrainedModel) -> object:
        return RANDOM if text is None else round(perplexity(made, text).perplexity, 3)

    plain = widths.dense(model, 16, None)
    if bits == 16:
        facts = (16, 1.0, plain.read, plain.stored, quality(model))
        yield Contender("transformers", *facts, lambda _: _generating(model))
        yield Contender("transformers, compiled", *facts, lambda _: _compiled(model))
    elif "torchao" in rivals:
        made, size = _torchao(model, bits)
        facts = (bits, 1.0, size, size, quality(made))
        yield Contender(f"torchao int{bits}, compiled", *facts, lambda _: _compiled(made))
    if "llama.cpp" in rivals:
        path, kind = folder / f"{bits}.gguf", WIDTHS[bits]
        write_gguf(model, path, kind)
        rounded = model if text is None else _rounded(model, kind)
        facts = (bits, 1.0, matrix_bytes(path), path.stat().st_size, quality(rounded))
        yield Contender(f"llama.cpp {kind}", *facts, lambda threads: _llama_cpp(path, threads))
    dense = plain if bits == 16 else widths.dense(model, bits, stats)
    for ours in (dense, *widths.masked(model, bits, RATIOS, stats)):
        facts = (bits, ours.cost_ratio, ours.read, ours.stored, quality(ours.model))
        name = "ours, dense" if ours is dense else "ours, masked"
        yield Contender(name, *facts, lambda _, ours=ours: _generating(ours.model, ours.prepare))


def _rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    made = copy.deepcopy(model)
    round_like(made, kind)
    return made


def _torchao(model: PreTrainedModel, bits: int) -> tuple[PreTrainedModel, int]:
    """Return the model with torchao's weights in 8 or 4 bits, and the bytes of its linears."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made, weights = twin(model), sum(p.numel() for p in model.parameters() if p.dim() == 2)
    four = PrototypeInt4WeightOnlyConfig(group_size=widths.GROUP)  # its format for a CPU
    quantize_(made, Int8WeightOnlyConfig() if bits == 8 else four)
    return made, weights if bits == 8 else weights * 5 // 8  # a step and a zero point of 16 bits for 32


class _Clock:
    """A streamer that keeps the time of each token. The first call has the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def _generating(model: PreTrainedModel, prepare: Callable[[], None] = lambda: None) -> Iterator[Write]:
    def write(prompt: list[int], tokens: int) -> tuple[float, float]:
        prepare()
        clock, ids = _Clock(), torch.tensor([prompt])
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            eos_token_id=None, streamer=clock,
        )  # fmt: skip
        first, last = clock.times[1], clock.times[-1]
        return first - begin, (last - first) / (tokens - 1)

    yield write


@contextmanager
def _compiled(model: PreTrainedModel) -> Iterator[Write]:
    step = compiled(model)
    decoders: list[Decoder] = []

    @torch.inference_mode()
    def write(prompt: list[int], tokens: int) -> tuple[float, float]:
        if not decoders:
            decoders.append(Decoder(model, 1, len(prompt) + tokens, step))
            decoders[0].read(torch.tensor([prompt]))
            decoders[0].decode(1)  # compiles
        begin = time.perf_counter()
        decoders[0].read(torch.tensor([prompt]))
        first = time.perf_counter()
        decoders[0].decode(tokens - 1)
        return first - begin, (time.perf_counter() - first) / (tokens - 1)

    yield write


@contextmanager
def _llama_cpp(path: Path, threads: int) -> Iterator[Write]:
    process = LlamaCpp(path, threads)
    try:
        yield process.write
    finally:
        process.close()
