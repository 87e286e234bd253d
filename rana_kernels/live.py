"""Counting the rows that the masks keep, from outside the modules: an op returns y and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rana_kernels.modules import RanaLinear, RanaMLP, RanaNeuronLinear


@dataclass
class LiveCount:
    """Rows kept over `tokens` tokens, of `rows` that could have been."""

    rows: int
    kept: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Mean kept rows a token; NaN before the first token."""
        return self.kept / self.tokens if self.tokens else float("nan")


@contextmanager
def count_live(model: nn.Module) -> Iterator[dict[str, LiveCount]]:
    """Count kept rows of every adapter while the model runs inside the `with` block.

    Yields a dict, filled as the model runs: the name of the adapted linear (for a joint adapter the
    first of its linears) -> LiveCount. Every token that is run counts, padding included. The masks
    are computed once more by the reference implementation: this is for measuring, not for serving.
    """
    counts: dict[str, LiveCount] = {}

    def hook_for(name: str):
        @torch.no_grad()
        def hook(module, inputs: tuple, _output: object) -> None:
            for child, mask in module.masks(inputs[0]).items():
                count = counts.setdefault(".".join(filter(None, [name, child])), LiveCount(mask.shape[-1]))
                count.kept += int(mask.sum())
                count.tokens += mask.shape[:-1].numel()

        return hook

    hooks = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if isinstance(module, RanaLinear | RanaNeuronLinear | RanaMLP)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
