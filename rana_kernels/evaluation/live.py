"""Counting the rows that the masks keep, from outside the modules: an op returns y and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class LiveCount:
    """Rows that one adapter keeps, of `rows` that it could, token by token in the order they are run."""

    rows: int
    _parts: list[Tensor] = field(default_factory=list)

    def add(self, mask: Tensor) -> None:
        """mask [..., rows] bool."""
        self._parts.append(mask.sum(-1, dtype=torch.int32).flatten().cpu())

    @property
    def per_token(self) -> Tensor:
        """int32 [tokens]."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, dtype=torch.int32)

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def mean(self) -> float:
        """Mean kept rows a token; NaN before the first token."""
        return float(self.per_token.double().mean())

    def quantiles(self, *at: float) -> tuple[float, ...]:
        """Kept rows at these shares of the tokens, ordered by what they keep: 0.5 is the median token."""
        ordered = self.per_token.sort().values
        return tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in at)


@contextmanager
def count_live(model: nn.Module) -> Iterator[dict[str, LiveCount]]:
    """Count kept rows of every adapter while the model runs inside the `with` block.

    Yields a dict, filled as the model runs: the name of the adapted linear (for a joint adapter the
    first of its linears) -> LiveCount. Any module with a method `masks`, as those of `modules.py` have
    it, is an adapter. Every token that is run counts, padding included. The masks are computed once
    more by the reference implementation: this is for measuring, not for serving.
    """
    counts: dict[str, LiveCount] = {}

    def hook_for(name: str):
        @torch.no_grad()
        def hook(module, inputs: tuple, _output: object) -> None:
            for child, mask in module.masks(inputs[0]).items():
                full = ".".join(filter(None, [name, child]))
                counts.setdefault(full, LiveCount(mask.shape[-1])).add(mask)

        return hook

    hooks = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if hasattr(module, "masks")
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
