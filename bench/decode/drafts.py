"""Speculative decoding: a RaNA model drafts, and the dense model that it was made from checks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rana_kernels.system.cpu import clock

DRAFTED = (2, 4, 8)  # tokens drafted before each check


@dataclass(frozen=True)
class Drafting:
    """`accepted` of the `drafted` tokens stood a check, in the mean; tokens a second of `generate`.

    same   share of the texts that are those of the dense model alone: all in float32. In 16 bits products
           of one token and of several round differently, and two tokens may be all but equally likely
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
    """Over the rows of `prompts` [n, T], one at a time, `tokens` new ones each, greedily."""
    wanted = [_generate(dense, row[None], tokens)[0] for row in prompts]
    found = []
    for drafted in DRAFTED:
        draft.generation_config.num_assistant_tokens = drafted
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        alone, together, checks, same = 0.0, 0.0, 0, 0
        for _ in range(rounds):
            for row, text in zip(prompts, wanted, strict=True):
                alone += _generate(dense, row[None], tokens)[1]
                with _Calls(dense) as calls:
                    again, seconds = _generate(dense, row[None], tokens, assistant_model=draft)
                same += torch.equal(again, text)
                together += seconds
                checks += calls.count
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


class _Calls:
    """Counts the forward passes of a model within the block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.count = model, 0

    def __enter__(self) -> "_Calls":
        self._hook = self.model.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _add(self, *_: object) -> None:
        self.count += 1
