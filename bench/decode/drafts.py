"""Speculative decoding: a RaNA model drafts, and the dense model that it was made from checks."""

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from bench.report.tables import terminal_table
from rana_kernels.system.cpu import clock

DRAFTED = (2, 4, 8)  # tokens drafted before each check


@dataclass(frozen=True)
class Drafting:
    """`accepted` of the `drafted` tokens pass a check, on average; tokens a second of `generate`.

    same   share of the texts that equal the dense model's own. It is 1 in float32. In 16 bits, products of
           one token and of several round differently, and two tokens may be almost equally likely
    """

    drafted: int
    accepted: float
    same: float
    tokens_per_second: float
    dense_tokens_per_second: float

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.dense_tokens_per_second


@torch.inference_mode()
def measure_drafts(
    dense: PreTrainedModel, draft: PreTrainedModel, prompts: Tensor, tokens: int, rounds: int = 3
) -> list[Drafting]:
    """Continue each of the `prompts` [n, T], one at a time, with `tokens` new tokens, greedily."""
    wanted = [_generate(dense, prompt[None], tokens)[0] for prompt in prompts]
    found = []
    for drafted in DRAFTED:
        draft.generation_config.num_assistant_tokens = drafted
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        alone, together, checks, same = 0.0, 0.0, 0, 0

        def count(*_: object) -> None:
            nonlocal checks
            checks += 1

        for _ in range(rounds):
            for prompt, text in zip(prompts, wanted, strict=True):
                alone += _generate(dense, prompt[None], tokens)[1]
                hook = dense.register_forward_hook(count)
                again, seconds = _generate(dense, prompt[None], tokens, assistant_model=draft)
                hook.remove()
                same += torch.equal(again, text)
                together += seconds
        texts = rounds * len(prompts)
        new = texts * tokens
        found.append(Drafting(drafted, new / checks - 1, same / texts, new / together, new / alone))
    return found


def _generate(model: PreTrainedModel, prompt: Tensor, tokens: int, **options) -> tuple[Tensor, float]:
    now = clock(torch.get_num_threads())
    begin = now()
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens, max_new_tokens=tokens,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return text, now() - begin


def draft_table(found: list[Drafting], threads: int) -> Table:
    titles = ("drafted", "accepted", "same text", "tokens/s", "dense alone", "x dense")
    rows = [
        [str(d.drafted), f"{d.accepted:.2f}", f"{d.same:.0%}", f"{d.tokens_per_second:.1f}",
         f"{d.dense_tokens_per_second:.1f}", f"{d.speedup:.2f}"]
        for d in found
    ]  # fmt: skip
    return terminal_table(f"RaNA drafts for the dense model, {threads} threads", titles, rows)
