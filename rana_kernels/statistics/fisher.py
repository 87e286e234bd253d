"""How the loss depends on what each linear puts out: mean squared derivatives, by a few backward passes.

To second order the loss rises by the error of an output times the curvature there, for which the mean
squared derivative stands in: the Fisher information, diagonal. It weighs errors of different linears, and
of the outputs of one, against each other. The tokens whose loss is differentiated are drawn from the
model's own predictions, as the Fisher information has it: those of the text say as much about where the
model is wrong as about how it bends (Kunstner et al., 2019, arXiv 1905.12558).
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.model.architectures import Block, is_described
from rana_kernels.statistics.processes import ProcessGroupSums

TOKENS = 32768  # how many of the calibration's first tokens are differentiated: the means settle soon


class FisherDiagonal:
    """Sums over tokens, collected batch by batch."""

    def __init__(self, model: nn.Module, blocks: list[Block]) -> None:
        self.model, self.tokens = model, 0
        self.names = [name for block in blocks for name in block.linears]
        self.sums: dict[str, Tensor] = {}

    def add(self, kwargs: dict[str, Any], run: bool = True) -> None:
        """Differentiate the loss of next tokens drawn for one batch of model inputs, row by row.

        run   False: another process does, and its tokens are counted here
        """
        for i in range(len(kwargs["input_ids"])):
            if self.tokens >= TOKENS:
                return
            self._row({k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}, run)

    def means(self, sums: ProcessGroupSums) -> dict[str, Tensor]:
        """Of all processes; empty where there was no row with a loss."""
        # a process that had no row does not know how wide the outputs are
        widths = torch.tensor([self.sums[name].numel() if name in self.sums else 0 for name in self.names])
        means = {}
        for name, width in zip(self.names, sums.reduce(widths, dist.ReduceOp.MAX).tolist(), strict=True):
            total = self.sums.get(name, torch.zeros(width, dtype=torch.float64, device=sums.device))
            if width:
                means[name] = sums.reduce(total) / self.tokens
        return means

    def _row(self, kwargs: dict[str, Any], run: bool) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        follows = torch.ones_like(ids[0, 1:]) if mask is None else mask[0, 1:]
        if not follows.any():
            return
        if run:
            with torch.enable_grad(), self._differentiating():
                # a sum: then a token's derivative does not depend on how many others there are
                logits = self._logits(kwargs)[0, :-1].float()
                labels = drawn(logits.detach(), self.tokens).masked_fill(follows == 0, -100)
                F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").backward()
        self.tokens += ids.numel() if mask is None else int(mask.sum())

    def _logits(self, kwargs: dict[str, Any]) -> Tensor:
        if is_described(self.model):
            output = self.model(kwargs["input_ids"])
            logits = getattr(output, "logits", output)
        else:
            logits = getattr(self.model(**kwargs, use_cache=False), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise ValueError(
                f"calibrate: gradients need a loss, and {type(self.model).__name__} gives no logits, "
                "wanted a model with a language-model head (or another method)"
            )
        return logits

    def _embeddings(self) -> nn.Module:
        if not is_described(self.model):
            return self.model.get_input_embeddings()  # type: ignore[operator]
        return next(m for m in self.model.modules() if isinstance(m, nn.Embedding))

    @contextmanager
    def _differentiating(self):
        """Derivatives of outputs and of no weight: weights need no memory for theirs."""
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [self._embeddings().register_forward_hook(_start)]
        hooks += [self.model.get_submodule(n).register_forward_hook(self._collector(n)) for n in self.names]
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
            for hook in hooks:
                hook.remove()

    def _collector(self, name: str):
        def collect(gradient: Tensor) -> None:
            squares = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0, dtype=torch.float64)
            # float32 summed in float64: no rounding, so no order, unless rows differ by seven orders
            self.sums[name] = self.sums.get(name, 0) + squares.float().double()

        return lambda _module, _args, output: output.register_hook(collect) and None


def drawn(logits: Tensor, seed: int) -> Tensor:
    """A token [T] for each row of `logits` [T, V], as likely as the model says, the same for a seed."""
    share = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    sums = logits.softmax(-1).cumsum(-1)
    return (sums <= share * sums[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)


def _start(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()
