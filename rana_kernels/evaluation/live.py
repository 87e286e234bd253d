"""The count of live rows. Hooks compute the masks again, because an op returns only y."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rana_kernels.model.hooks import of_this_thread


@dataclass
class LiveCount:
    """The live rows of one adapter with `rows` rows, for each token in the order of the run."""

    rows: int
    _parts: list[Tensor] = field(default_factory=list)

    def add(self, mask: Tensor) -> None:
        """Count the tokens of a mask [..., rows] bool."""
        self._parts.append(mask.sum(-1, dtype=torch.int32).flatten().cpu())

    @property
    def per_token(self) -> Tensor:
        """The live rows of each token, int32 [tokens]."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, dtype=torch.int32)

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def mean(self) -> float:
        """The mean live rows a token; NaN before the first token."""
        return float(self.per_token.double().mean())

    def quantiles(self, *at: float) -> tuple[float, ...]:
        """Return the live rows at the given quantiles of the tokens: 0.5 is the median token."""
        ordered = self.per_token.sort().values
        return tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in at)


@contextmanager
def count_live(model: nn.Module) -> Iterator[dict[str, LiveCount]]:
    """Count the live rows of every adapter while the model runs inside the `with` statement.

    Yields a dict that is filled while the model runs: name of the adapted linear (the first one of a joint
    adapter) -> LiveCount. All tokens that this thread runs count, padding included.
    """
    counts: dict[str, LiveCount] = {}

    def count(name: str, mask: Tensor) -> None:
        counts.setdefault(name, LiveCount(mask.shape[-1])).add(mask)

    with watch_masks(model, count):
        yield counts


@contextmanager
def watch_masks(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, mask) for every adapter that runs inside the `with` statement, in this thread.

    `name` is that of the adapted linear, the first one of a joint adapter; `mask` [..., rows] is bool. Every
    module with a method `masks`, like those of `nn/adapters.py`, is an adapter. The reference implementation
    computes the masks a second time, so use this to measure and not to serve.
    """

    def hook_for(name: str):
        @torch.no_grad()
        def hook(module, inputs: tuple, _output: object) -> None:
            for child, mask in module.masks(inputs[0]).items():
                see(".".join(filter(None, [name, child])), mask)

        return hook

    hooks = [
        module.register_forward_hook(of_this_thread(hook_for(name)))
        for name, module in model.named_modules()
        if hasattr(module, "masks")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
