"""One budget in 16 and in 4 bits: perplexity, bytes and tokens a second of three whole models."""

import torch
from torch import Tensor, nn

import rana_kernels as rana
from bench.decode.measure import Setting, take_turns
from bench.quality.subject import BATCH, Candidate, Subject
from examples.demo.results import InBits
from rana_kernels.compression.report import head_bytes
from rana_kernels.evaluation.metrics import perplexity

PROMPT, ROUNDS, TURN = 32, 9, 8  # tokens before, rounds, and tokens that each model writes in a round


def measure_bits(subject: Subject, sixteen: Candidate, dense: float, budget: float) -> list[InBits]:
    """Compress to 4 bits and compare with the dense model, whose perplexity is `dense`, and with `sixteen`.

    `sixteen` is the model at the same budget in 16 bits.
    """
    model, stats = subject.copy()
    four = rana.compress(model, stats=stats, flops_reduction=budget, bits=4, progress=False)
    models = {"dense": subject.dense, "16 bits": sixteen.model, "4 bits": model}
    speed = _tokens_a_second(models)
    before = four.read_bytes_before  # a dense model reads all that its linears store
    found = [InBits("dense", 16, dense, 0.0, before / 1e6, before / 1e6, speed["dense"])]
    for label, bits, report in (("16 bits", 16, sixteen.report), ("4 bits", 4, four)):
        lost = _perplexity(models[label], subject.evaluation)
        stored = report.block_bytes_after + head_bytes(models[label])
        read = report.read_bytes_after
        found.append(InBits("global", bits, lost, lost / dense - 1, stored / 1e6, read / 1e6, speed[label]))
    return found


def _perplexity(model: nn.Module, evaluation: Tensor) -> float:
    return perplexity(model, evaluation, batch=BATCH, progress=False).perplexity


def _tokens_a_second(models: dict[str, nn.Module]) -> dict[str, float]:
    """Return the speed of each model, which writes one text on all threads. The models take turns."""
    setting = Setting(PROMPT, batch=1, threads=torch.get_num_threads(), read=True)
    steps = {label: (model, model.forward) for label, model in models.items()}
    return {row["contender"]: float(row["tokens/s"]) for row in take_turns(steps, setting, ROUNDS, TURN)}
