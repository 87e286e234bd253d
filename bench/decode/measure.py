"""What is measured of models: speed in turns, the division of a token's time, speculative decoding."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from bench.decode.steps import Decoder
from bench.kernels.timing import summary, timed, using
from bench.report.results import Row

READINGS = 3  # of a prompt by each contender,
READ_TOKENS = 6144  # or fewer, one at least, so that they come to no more tokens than this
BASELINE = "dense"
MOST = 6  # torch's ops that are listed by name
DRAFTED = (2, 4, 8)  # tokens drafted before each check


@dataclass(frozen=True)
class Setting:
    """`batch` texts after `prompt` tokens each. If not `read`, the prompt's keys and values are random."""

    prompt: int
    batch: int
    threads: int
    read: bool


Steps = dict[str, tuple[PreTrainedModel, Callable]]
Shares = dict[str, tuple[float, float]]  # milliseconds and calls of a step


@torch.inference_mode()
def take_turns(contenders: Steps, setting: Setting, rounds: int, turn: int) -> list[Row]:
    """Let every contender, a model and its step function, decode `turn` tokens in each round.

    Return a row for each contender: tokens a second of the whole batch, and the ratio to dense.
    """
    room = setting.prompt + turn * (rounds + 1) + 1
    decoders = {n: Decoder(model, setting.batch, room, step) for n, (model, step) in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    with using(setting.threads):
        first = {name: summary(read) for name, read in _read_prompts(decoders, setting).items() if read}
        for _ in range(rounds + 1):  # the first round warms up, or compiles
            for name, decoder in decoders.items():
                seconds[name].append(decoder.decode(turn))
    steps = {name: summary(values[1:]) for name, values in seconds.items()}
    rates = {
        n: [round(1e6 * setting.batch / us, 2) for us in (t.median, t.p80, t.p20)] for n, t in steps.items()
    }
    return [
        {
            "prompt": setting.prompt,
            "batch": setting.batch,
            "threads": setting.threads,
            "contender": name,
            "first token ms": round(first[name].median / 1e3, 1) if first else "",
            "x dense, first": round(first[BASELINE].median / first[name].median, 2) if first else "",
            **dict(zip(("tokens/s", "p20", "p80"), rates[name], strict=True)),
            "x dense": round(steps[BASELINE].median / step.median, 2),
        }
        for name, step in steps.items()
    ]


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


def where_time_goes(decoder: Decoder, tokens: int = 8) -> Shares:
    """Return the shares of one step on the processor that runs Python. A card's kernels are not seen.

    Loops that torch.compile writes are no ops, and count as outside of ops. The profiler slows short ops.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        begin = time.perf_counter()
        decoder.decode(tokens)
        whole = 1e3 * (time.perf_counter() - begin) / tokens  # by the clock of the profiler
    shares: Shares = {}
    others: Shares = {}
    for event in profiler.key_averages():
        if event.key.startswith("rana::"):
            shares[event.key] = (event.cpu_time_total / 1e3 / tokens, event.count / tokens)
        elif event.key.startswith(("aten::", "mkldnn::")):
            others[event.key] = (event.self_cpu_time_total / 1e3 / tokens, event.count / tokens)
    listed = sorted(others, key=lambda name: -others[name][0])
    shares |= {name: others[name] for name in listed[:MOST]}
    rest = [others[name] for name in listed[MOST:]]
    shares["other ops of torch's"] = (sum(ms for ms, _ in rest), sum(calls for _, calls in rest))
    return shares | {"outside of ops": (whole - sum(ms for ms, _ in shares.values()), 0)}


def share_rows(shares: dict[str, Shares]) -> list[Row]:
    """Return a row for each share, with a column for each model."""
    rows: dict[str, Row] = {}
    for name, part in shares.items():
        for what, (ms, calls) in part.items():
            row = rows.setdefault(what, {"": what})
            row[name] = f"{ms:.2f} ({calls:.0f})" if calls else f"{ms:.2f}"
    return list(rows.values())


@torch.inference_mode()
def measure_drafts(
    checker: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Tensor,
    tokens: int,
    rounds: int = 3,
    drafted: tuple[int, ...] = DRAFTED,
    baseline: PreTrainedModel | None = None,
) -> list[Row]:
    """Let `draft` draft for the model that it was made from, which checks its tokens.

    Each of the `prompts` [n, T] is continued by itself, with `tokens` new tokens, greedily. `baseline` takes
    turns with it; by default it is `checker` alone.

    `accepted` of the `drafted` tokens pass a check, on average. `same text` is the share of the texts that
    equal the checker's own. It is 1 in float32. In 16 bits, products of one token and of several round
    differently, and two tokens may be almost equally likely: `gap` is the largest difference of two logits by
    which a text chose another token.
    """
    wanted = [_continue(checker, prompt, tokens)[1] for prompt in prompts]
    found: list[Row] = []
    for count in drafted:
        draft.generation_config.num_assistant_tokens = count
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        alone, together, same, gap, checks = 0.0, 0.0, 0, 0.0, []
        for prompt, text in rounds * list(zip(prompts, wanted, strict=True)):
            alone += _continue(baseline or checker, prompt, tokens)[0]
            hook = checker.register_forward_hook(lambda *_, checks=checks: checks.append(1))
            seconds, again = _continue(checker, prompt, tokens, assistant_model=draft)
            hook.remove()
            same += torch.equal(again, text)
            gap = max(gap, _gap(checker, text, again))
            together += seconds
        texts = rounds * len(prompts)
        new = texts * tokens
        found.append({
            "drafted": count, "accepted": f"{new / len(checks) - 1:.2f}", "same text": f"{same / texts:.0%}",
            "gap": f"{gap:.2f}", "tokens/s": f"{new / together:.1f}", "dense alone": f"{new / alone:.1f}",
            "x dense": f"{alone / together:.2f}",
        })  # fmt: skip
    return found


def _continue(model: PreTrainedModel, prompt: Tensor, tokens: int, **options) -> tuple[float, Tensor]:
    """Return the seconds that a model takes to continue a prompt [T], and the text [1, T + tokens]."""
    prompt = prompt[None]
    return timed(
        model.generate, prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens,
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


def _gap(model: PreTrainedModel, text: Tensor, other: Tensor) -> float:
    """Return by how much the model's logits of the first tokens differ that two texts [1, T] do not share."""
    parted = (text != other)[0].nonzero()
    if not len(parted):
        return 0.0
    at = int(parted[0])
    logits = model(text[:, :at]).logits[0, -1]
    return float((logits[text[0, at]] - logits[other[0, at]]).abs())
