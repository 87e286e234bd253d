"""Contenders take turns at the first token of a prompt and the tokens after it, which gives rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.decode.steps import Decoder
from bench.kernels.timing import Timing, summary, using
from bench.report.results import Row

READINGS = 3  # of a prompt by each contender,
READ_TOKENS = 6144  # or fewer, one at least, so that they come to no more tokens than this
BASELINE = "dense"


@dataclass(frozen=True)
class Setting:
    """`batch` texts after `prompt` tokens each. If not `read`, the prompt's keys and values are random."""

    prompt: int
    batch: int
    threads: int
    read: bool


@dataclass(frozen=True)
class Speed:
    """Microseconds: of the first token, if the prompt is read, and of a step after it."""

    first: Timing | None
    step: Timing


Steps = dict[str, tuple[PreTrainedModel, Callable]]


@torch.inference_mode()
def take_turns(contenders: Steps, setting: Setting, rounds: int, turn: int) -> dict[str, Speed]:
    """Let every contender, a model and its step function, decode `turn` tokens in each round."""
    room = setting.prompt + turn * (rounds + 1) + 1
    decoders = {n: Decoder(model, setting.batch, room, step) for n, (model, step) in contenders.items()}
    steps: dict[str, list[float]] = {name: [] for name in decoders}
    with using(setting.threads):
        first = _read_prompts(decoders, setting)
        for _ in range(rounds + 1):  # the first round warms up, or compiles
            for name, decoder in decoders.items():
                steps[name].append(decoder.decode(turn))
    return {
        name: Speed(summary(first[name]) if setting.read else None, summary(seconds[1:]))
        for name, seconds in steps.items()
    }


def _read_prompts(decoders: dict[str, Decoder], setting: Setting) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    if not setting.read:
        for decoder in decoders.values():
            decoder.pretend(setting.prompt)
        return seconds
    prompt = random_tokens(next(iter(decoders.values())).model, setting)
    for _ in range(max(1, min(READINGS, READ_TOKENS // prompt.numel()))):
        for name, decoder in decoders.items():
            seconds[name].append(decoder.read(prompt))
    return seconds


def random_tokens(model: PreTrainedModel, setting: Setting) -> Tensor:
    size = (setting.batch, setting.prompt)
    return torch.randint(model.config.vocab_size, size, device=model.device)


def rows(setting: Setting, speeds: dict[str, Speed]) -> list[Row]:
    """Return a row for each contender: tokens a second of the whole batch, and the ratio to dense."""
    dense = speeds[BASELINE]
    found: list[Row] = []
    for name, speed in speeds.items():
        step, first = speed.step, speed.first
        read = first is not None and dense.first is not None
        found.append(
            {
                "prompt": setting.prompt,
                "batch": setting.batch,
                "threads": setting.threads,
                "contender": name,
                "first token ms": round(first.median / 1e3, 1) if read else "",
                "x dense, first": round(dense.first.median / first.median, 2) if read else "",
                "tokens/s": _rate(setting, step.median),
                "p20": _rate(setting, step.p80),
                "p80": _rate(setting, step.p20),
                "x dense": round(dense.step.median / step.median, 2),
            }
        )
    return found


def _rate(setting: Setting, microseconds: float) -> float:
    return round(1e6 * setting.batch / microseconds, 2)
