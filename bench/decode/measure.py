"""Contenders taking turns: the first token of a prompt, then the tokens after it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.decode.steps import Decoder
from bench.timing import Timing, summary, using

READINGS = 3  # of a prompt by each contender,
READ_TOKENS = 6144  # or as many as come to so many tokens, and one at least


@dataclass(frozen=True)
class Setting:
    """`prompt` tokens in each of `batch` rows; `read`: whether they are, or keys and values are made up."""

    prompt: int
    batch: int
    threads: int
    read: bool


@dataclass(frozen=True)
class Speed:
    """Microseconds: of the first token, where the prompt is read, and of a step after it."""

    first: Timing | None
    step: Timing


Steps = dict[str, tuple[PreTrainedModel, Callable]]


@torch.inference_mode()
def take_turns(contenders: Steps, setting: Setting, rounds: int, turn: int) -> dict[str, Speed]:
    """Every contender, a model and what computes its steps, decodes `turn` tokens in each round."""
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
