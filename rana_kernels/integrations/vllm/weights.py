"""The adapters of one vLLM layer: how their tensors are packed, and which part of them this process holds.

A layer has B, rows, threshold, norms and weight, flat, under the names that the checkpoint has: in each of
them those of its adapters one after the other, whatever their ranks. `weight` is that of its dense linears.

With tensor parallelism over P processes:

    column-parallel    a process has its columns of `rows`, and all of B: each of them decides the same mask
                       on the same bits. Nothing is sent
    row-parallel       of a neuron adapter a process has its own neurons. Nothing is sent. Of a rank adapter
                       it has its columns of B and a P-th of the ranks, in float32: h is summed over the
                       processes before it is masked, by a reduce-scatter of 4·R bytes a token

The sum of y that vLLM itself makes after a row-parallel layer comes on top.
"""

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase
from vllm.model_executor.utils import set_weight_attrs

from rana_kernels.checkpoint.headers import CheckpointError
from rana_kernels.model.plan import AdapterSpec

NAMES = ("B", "rows", "threshold", "norms", "weight")
_NUMBERS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the outputs of a merged layer


@dataclass(frozen=True)
class Share:
    """`size` entries from `start` on, of `total` that the checkpoint has."""

    start: int
    size: int
    total: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, self.start, self.size)


@dataclass(frozen=True)
class Piece:
    """One adapter of a layer, as far as this process computes it.

    inputs    its share of the K inputs
    ranks     of the R ranks; of none unless it is a rank adapter
    columns   of each of the layer's outputs that the adapter computes
    first     the number of the first of these outputs
    """

    adapter: AdapterSpec
    inputs: Share
    ranks: Share
    columns: tuple[Share, ...]
    first: int

    @property
    def width(self) -> int:
        return sum(column.size for column in self.columns)

    @property
    def scattered(self) -> bool:
        """Whether its rank values are sums over the processes, which share out its ranks."""
        return self.adapter.kind == "rank" and self.inputs.size < self.inputs.total

    @property
    def masked(self) -> Share:
        """What its thresholds and rows are of: ranks or neurons."""
        return self.ranks if self.adapter.kind == "rank" else self.inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that this process holds."""
        K, N, rows = self.inputs.size, self.width, self.masked.size
        if self.adapter.kind == "rank":
            return {"B": (self.ranks.total, K), "rows": (rows, N), "threshold": (rows,)}
        if self.adapter.kind == "neuron":
            return {"rows": (rows, N), "threshold": (rows,), "norms": (rows,)}
        return {"weight": (N, K)}

    def stored(self, name: str, output: int) -> list[tuple[int, ...]]:
        """The shapes that the checkpoint may have `name` in, under the name of output `output`.

        Rows of a joint RanaMLP come once for each output; everything else once for all that the adapter
        computes.
        """
        K, rows, total = self.inputs.total, self.masked.total, sum(column.total for column in self.columns)
        one = self.columns[output - self.first].total
        shapes: dict[str, list[tuple[int, ...]]] = {
            "B": [(self.ranks.total, K)],
            "rows": [(rows, total), (rows, one)],
            "weight": [(total, K)],
        }
        return shapes.get(name, [(rows,)]) if name in self.shapes else []

    def fill(self, name: str, mine: Tensor, stored: Tensor, output: int) -> int:
        """Copy this process's part of a stored tensor into `mine`; how many elements that were."""
        if name == "B":
            part = self.inputs.of(stored, 1)
        elif name in ("threshold", "norms"):
            part = self.masked.of(stored, 0)
        elif name == "weight":
            part = self._columns(self.inputs.of(stored, 1), 0)
        elif stored.shape == self.stored(name, output)[0]:
            part = self._columns(self.masked.of(stored, 0), 1)
        else:
            place = output - self.first
            part = self.columns[place].of(self.masked.of(stored, 0), 1)
            mine = mine.narrow(1, sum(column.size for column in self.columns[:place]), part.shape[1])
        mine.copy_(part)
        return mine.numel()

    def _columns(self, tensor: Tensor, dim: int) -> Tensor:
        blocks = tensor.split([column.total for column in self.columns], dim)
        return torch.cat([c.of(block, dim) for c, block in zip(self.columns, blocks, strict=True)], dim)


class Pieces:
    """The adapters of one layer in the order of its outputs, and what of their tensors was loaded."""

    def __init__(self, prefix: str, pieces: list[Piece]) -> None:
        self.prefix, self.pieces = prefix, pieces
        self._loaded: dict[str, dict[tuple[int, int], int]] = {name: {} for name in NAMES}

    def register(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Give `layer` its tensors, empty. Thresholds and norms are float32, and everything is where rank
        values are summed over processes."""
        scattered = any(piece.scattered for piece in self.pieces)
        for name in NAMES:
            wide = scattered or name in ("threshold", "norms")
            data = torch.empty(self._size(name), dtype=torch.float32 if wide else dtype)
            parameter = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self.load, name)})
            layer.register_parameter(name, parameter)

    def _size(self, name: str, before: int | None = None) -> int:
        return sum(prod(piece.shapes[name]) for piece in self.pieces[:before] if name in piece.shapes)

    def view(self, flat: Tensor, name: str, index: int) -> Tensor:
        """The tensor of adapter number `index` within the layer's."""
        shape = self.pieces[index].shapes[name]
        return flat.narrow(0, self._size(name, index), prod(shape)).view(shape)

    def load(self, name: str, flat: nn.Parameter, stored: Tensor, shard: str | int | None = None) -> None:
        """vLLM's `weight_loader`: take this process's part of one tensor of the checkpoint.

        shard   which output of a merged layer it is of. None: the only one, or what a RanaMLP stacks, up
                over gate, where vLLM has gate first
        Raises CheckpointError for a tensor that is not what the plan says.
        """
        if name == "weight" and stored.numel() == 0:
            return  # an adapted linear's, there so that other programs do not load it
        if shard is None and len(self.pieces) > 1:
            for index, part in self._unstack(name, stored):
                self._fill(name, flat, part, index, self.pieces[index].first)
        else:
            output = _NUMBERS[shard] if isinstance(shard, str) else shard or 0
            owners = (i for i, p in enumerate(self.pieces) if 0 <= output - p.first < len(p.columns))
            self._fill(name, flat, stored, next(owners), output)

    def _unstack(self, name: str, stored: Tensor) -> list[tuple[int, Tensor]]:
        sizes = [piece.ranks.total for piece in self.pieces]
        if stored.shape[0] != sum(sizes):
            raise CheckpointError(
                f"{self.prefix}: {name} has {stored.shape[0]} rows, wanted {sum(sizes)} by the plan"
            )
        return list(zip(reversed(range(len(sizes))), stored.split(sizes[::-1]), strict=True))

    def _fill(self, name: str, flat: nn.Parameter, stored: Tensor, index: int, output: int) -> None:
        piece = self.pieces[index]
        wanted = piece.stored(name, output)
        if tuple(stored.shape) not in wanted:
            raise CheckpointError(
                f"{self.prefix}: {name} of {', '.join(piece.adapter.names)} has shape {tuple(stored.shape)}, "
                f"wanted {wanted[0] if wanted else 'none'} by the plan"
            )
        mine = self.view(flat.data, name, index)
        self._loaded[name][index, output] = piece.fill(name, mine, stored, output)

    def check(self, layer: nn.Module) -> None:
        """Raise CheckpointError unless everything was loaded and every threshold is finite and >= 0."""
        for name in NAMES:
            found, wanted = sum(self._loaded[name].values()), self._size(name)
            if found != wanted:
                raise CheckpointError(f"{self.prefix}: {found} of {wanted} numbers of {name} were loaded")
        threshold = layer.get_parameter("threshold")
        if not (threshold.isfinite() & (threshold >= 0)).all():
            raise CheckpointError(f"{self.prefix}: a threshold is negative or not finite")


def pieces_of(
    layer: LinearBase, names: list[str], adapters: list[AdapterSpec], inputs: Share, widths: list[int]
) -> Pieces:
    """What of `adapters` this process computes in `layer`.

    names      the plan's names of the linears that the layer computes: one for each of its outputs, or one
               for all of them
    adapters   theirs, each once
    widths     of the outputs, in this process

    Raises ValueError for sizes that differ from the plan's or cannot be divided, and for linears that share
    an adapter but are no neighbours in the layer.
    """
    outputs, pieces, first = _outputs(layer, widths), [], 0
    for adapter in adapters:
        count = len(outputs) if len(names) == 1 else len(adapter.names)
        columns = outputs[first : first + count]
        _check(layer, adapter, tuple(names[first : first + count]), inputs, columns)
        pieces.append(Piece(adapter, inputs, _ranks(layer, adapter, inputs), tuple(columns), first))
        first += count
    return Pieces(layer.prefix, pieces)


def _outputs(layer: LinearBase, widths: list[int]) -> list[Share]:
    if not isinstance(layer, ColumnParallelLinear):
        return [Share(0, width, width) for width in widths]
    shares = []
    for i, width in enumerate(widths):
        # where there are more processes than heads of keys, several of them have the same one
        copies = getattr(layer, "num_kv_head_replicas", 1) if i > 0 else 1
        shares.append(Share(layer.tp_rank // copies * width, width, layer.tp_size // copies * width))
    return shares


def _ranks(layer: LinearBase, adapter: AdapterSpec, inputs: Share) -> Share:
    R = adapter.rank if adapter.kind == "rank" else 0
    if inputs.size == inputs.total:
        return Share(0, R, R)
    if R % layer.tp_size:
        raise ValueError(
            f"{layer.prefix}: its {R} ranks cannot be shared out among {layer.tp_size} processes, wanted a "
            "tensor_parallel_size that divides them"
        )
    return Share(layer.tp_rank * R // layer.tp_size, R // layer.tp_size, R)


def _check(
    layer: LinearBase, adapter: AdapterSpec, names: tuple[str, ...], inputs: Share, columns: list[Share]
) -> None:
    if names != adapter.names:
        raise ValueError(
            f"{layer.prefix}: one adapter has {', '.join(adapter.names)}, which are no neighbours in this "
            "layer of vLLM. Compress the model with another plan"
        )
    wanted = (adapter.in_features, adapter.width)
    given = (inputs.total, sum(column.total for column in columns))
    if given != wanted:
        raise ValueError(
            f"{layer.prefix}: the plan has {wanted[0]} -> {wanted[1]} for {', '.join(names)}, vLLM's layer "
            f"{given[0]} -> {given[1]}"
        )
