"""The sensitivity of the loss: derivatives by the outputs and inputs of every linear.

To second order the loss rises by the squared error of an output times the curvature. The diagonal Fisher
information, a mean squared derivative, approximates the curvature. It makes the errors of different outputs
and linears comparable. The labels of the loss are drawn from the model's own predictions, as the Fisher
information is defined. With the labels of the text, the derivatives would also measure where the model is
wrong (Kunstner et al., 2019, arXiv 1905.12558).

The derivatives of single tokens say more: if an input changes by d, the loss of this token's successors rises
by (slope · d)² / 2 on average over the labels. This includes errors of many
outputs at once, and that some tokens matter more than others.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.model.architectures import Block, is_described
from rana_kernels.model.hooks import of_this_thread
from rana_kernels.model.linears import linear_of
from rana_kernels.model.logits import Logits
from rana_kernels.statistics.importance import Importance
from rana_kernels.statistics.processes import ProcessGroupSums
from rana_kernels.statistics.sampling import Sampler, placed

TOKENS = 32768  # the loss is differentiated on so many first tokens: more hardly change the means
PAIRS = 2048  # of these tokens, whose derivatives are kept


class Derivatives:
    """The derivatives of the loss on the first tokens of a calibration, collected sequence by sequence.

    squares     [N] by linear: the sums over tokens of the squared derivatives by outputs
    slopes      [P, K] bfloat16 by linear: the derivatives by its input, of sampled tokens
    paired      [P, K] by (index of the block, input): the inputs of these tokens. That of down is left out,
                because it is computed from that of the MLP
    importance  of tokens (`importance.py`)
    """

    def __init__(self, model: nn.Module, blocks: list[Block], seed: int) -> None:
        self.model, self.tokens, self.sampler = model, 0, Sampler(PAIRS, seed)
        readers = {(block.index, key): names for block in blocks for key, names in block.inputs.items()}
        self.keys = {name: key for key, names in readers.items() for name in names}
        self.inputs = {names[0]: key for key, names in readers.items() if key[1] != "down"}
        widths = {key: linear_of(model, names[0]).in_features for key, names in readers.items()}
        self.importance = Importance(widths, set(self.inputs.values()))
        self.squares: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.paired: dict[tuple[int, str], Tensor] = {}

    @property
    def wants_more(self) -> bool:
        return self.tokens < TOKENS

    def add(self, kwargs: dict[str, Any], unpadded: Tensor, sampled: tuple[Tensor, Tensor] | None) -> bool:
        """Differentiate the loss on one sequence of model inputs. Return False if it has no loss.

        unpadded   which tokens are not padding, bool [T]
        sampled    the tokens of this sequence that the calibration's sample takes, and their slots in it.
                   None: another process runs this sequence, and only its tokens are counted here
        """
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        follows = torch.ones_like(ids[0, 1:]) if mask is None else mask[0, 1:]
        if not follows.any():
            return False
        count = int(unpadded.sum())
        if sampled is not None:
            take, slots = self.sampler.select(count)
            place = unpadded.nonzero()[:, 0][take]
            chances = shares(len(follows), self.tokens).to(ids.device)

            def loss(_row: int, part: slice, logits: Tensor) -> Tensor:
                wide, after = logits[: len(follows[part])].float(), follows[part]
                if not wide.isfinite().all():
                    raise ValueError("calibrate: the logits hold values that are not finite")
                labels = chosen(wide.detach(), chances[part]).masked_fill(after == 0, -100)
                # with a sum, the derivative of a token does not depend on the number of tokens
                return F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum")

            with torch.enable_grad(), self._differentiating(place.to(ids.device), slots):
                Logits(self.model, **kwargs).backward(loss)
            self.importance.finish_sequence(unpadded, *sampled)
        else:
            self.sampler.skip(count)
        self.tokens += count
        return True

    def finish(self, sums: ProcessGroupSums) -> dict[str, Tensor]:
        """Merge the pairs of all processes, and return the means of the squares by linear.

        They are empty if no sequence had a loss.
        """
        self._merge(sums)
        # a process that ran no sequence does not know the widths of the outputs
        widths = torch.tensor(
            [self.squares[name].numel() if name in self.squares else 0 for name in self.keys]
        )
        means = {}
        for name, width in zip(self.keys, sums.reduce(widths, dist.ReduceOp.MAX).tolist(), strict=True):
            total = self.squares.get(name, torch.zeros(width, dtype=torch.float64, device=sums.device))
            if width:
                means[name] = sums.reduce(total) / self.tokens
        return means

    def _merge(self, sums: ProcessGroupSums) -> None:
        """Merge the pairs of all processes. One that ran no sequence has none, but takes part."""
        for name in self.keys:
            linear = linear_of(self.model, name)
            empty = torch.empty(0, linear.in_features, dtype=torch.bfloat16, device=sums.device)
            self.slopes.setdefault(name, empty)
            if name in self.inputs:
                self.paired.setdefault(self.inputs[name], empty.to(linear.weight.dtype))
        slopes = [self.slopes[name] for name in self.keys]
        self.sampler.merge([*slopes, *(self.paired[key] for key in self.inputs.values())], sums)

    def _embeddings(self) -> nn.Module:
        if not is_described(self.model):
            return self.model.get_input_embeddings()  # type: ignore[operator]
        return next(m for m in self.model.modules() if isinstance(m, nn.Embedding))

    @contextmanager
    def _differentiating(self, take: Tensor, slots: Tensor):
        """Collect derivatives by outputs. Derivatives by weights are off, which saves their memory.

        take, slots   the tokens of this sequence that are sampled, and their slots in the samples
        """
        self._new_slopes: dict[str, list[Tensor]] = {}
        self._new_paired: dict[tuple[int, str], list[Tensor]] = {}
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [self._embeddings().register_forward_hook(of_this_thread(_start))]
        for name in self.keys:
            module = self.model.get_submodule(name)
            hooks.append(module.register_forward_hook(of_this_thread(self._collector(name, take))))
            if name in self.inputs:
                record = of_this_thread(self._recorder(self.inputs[name], take))
                hooks.append(module.register_forward_pre_hook(record))
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
            _place(self.slopes, slots, self._new_slopes)
            _place(self.paired, slots, self._new_paired)
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
            for hook in hooks:
                hook.remove()

    def _collector(self, name: str, take: Tensor):
        rows = _Rows(take)

        def collect(here: Tensor, gradient: Tensor) -> None:
            wide = gradient.reshape(-1, gradient.shape[-1]).float()
            squared = wide.square()
            self.importance.add(self.keys[name], name, squared)
            squares = squared.sum(0, dtype=torch.float64)
            # float64 sums of float32 values do not round, so their order does not matter, unless the values
            # of two sequences differ by seven orders of magnitude
            self.squares[name] = self.squares.get(name, 0) + squares.float().double()
            slopes = (wide[here] @ linear_of(self.model, name).weight.detach().float()).bfloat16()
            self._new_slopes.setdefault(name, []).append(slopes)

        return lambda _module, _args, output: output.register_hook(partial(collect, rows.of(output))) and None

    def _recorder(self, key: tuple[int, str], take: Tensor):
        rows = _Rows(take)

        def record(_module: nn.Module, args: tuple) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            self.importance.read(key, x)
            self._new_paired.setdefault(key, []).append(x[rows.of(x)])

        return record


class _Rows:
    """The sampled tokens `take` of a sequence, ascending, for a module that reads it part by part."""

    def __init__(self, take: Tensor) -> None:
        self.take, self.begin = take, 0

    def of(self, part: Tensor) -> Tensor:
        """Return the indices of the sampled tokens in the next part [..., any] of the sequence."""
        begin, self.begin = self.begin, self.begin + part.shape[:-1].numel()
        return self.take[(self.take >= begin) & (self.take < self.begin)] - begin


def _place(held: dict[Any, Tensor], slots: Tensor, new: dict[Any, list[Tensor]]) -> None:
    for key, parts in new.items():
        rows = torch.cat(parts)
        held[key] = placed(held.get(key, rows[:0]), slots, rows)


def sequences(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a batch of model inputs as batches of one sequence."""
    return [
        {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        for i in range(len(kwargs["input_ids"]))
    ]


def drawn(logits: Tensor, seed: int) -> Tensor:
    """Draw a token [T] from each distribution of `logits` [T, V]. A seed always gives the same tokens."""
    return chosen(logits, shares(len(logits), seed).to(logits.device))


def shares(count: int, seed: int) -> Tensor:
    """Return random numbers [count, 1] from 0 to 1."""
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(seed))


def chosen(logits: Tensor, share: Tensor) -> Tensor:
    """Return the tokens [T] of `logits` [T, V] at which the sum of probabilities exceeds `share` [T, 1]."""
    sums = logits.softmax(-1).cumsum_(-1)
    return (sums <= share * sums[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)


def _start(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()
