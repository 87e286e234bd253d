"""The tensors of one vLLM layer: how those of several adapters are packed, and which part a process holds.

A layer has five flat tensors with the names of the checkpoint: B, rows, threshold, norms and weight. Each
contains the tensors of all adapters of the layer, one after the other, so their ranks may differ. `weight`
contains the dense linears.

With tensor parallelism over P processes:

    column-parallel    A process has all of B and its columns of `rows`. All processes decide the same mask
                       on the same bits, and nothing is sent.
    row-parallel       Neuron adapter: a process has its own neurons, and nothing is sent.
                       Rank adapter: a process has its columns of B and 1/P of the ranks, in float32. A
                       reduce-scatter of 4·R bytes a token sums h over the processes before it is masked.

After a row-parallel layer, vLLM itself also sums y over the processes.
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
    """The `size` entries from `start` on, of the `total` entries in the checkpoint."""

    start: int
    size: int
    total: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this share of `tensor` along `dim`."""
        return tensor.narrow(dim, self.start, self.size)


@dataclass(frozen=True)
class Piece:
    """The part of one adapter that this process computes.

    inputs    its share of the K inputs
    ranks     its share of the R ranks; R is 0 unless this is a rank adapter
    columns   its share of the columns, for each output of the layer that the adapter computes
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
        """Whether its rank values are summed over the processes, and its ranks divided among them."""
        return self.adapter.kind == "rank" and self.inputs.size < self.inputs.total

    @property
    def masked(self) -> Share:
        """Its share of what the mask selects: ranks or neurons."""
        return self.ranks if self.adapter.kind == "rank" else self.inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that this process holds."""
        K, N, rows = self.inputs.size, self.width, self.masked.size
        if self.adapter.kind == "rank":
            return {"B": (self.ranks.total, K), "rows": (rows, N), "threshold": (rows,)}
        if self.adapter.kind == "neuron":
            return {"rows": (rows, N), "threshold": (rows,), "norms": (rows,)}
        return {"weight": (N, K)}

    def stored(self, name: str, output: int) -> list[tuple[int, ...]]:
        """Return the shapes that tensor `name` of output number `output` may have in the checkpoint.

        The rows of a joint RanaMLP, of ranks or neurons, are stored once for each output. All other tensors
        are stored once for all outputs of the adapter.
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
        """Copy this process's part of a stored tensor into `mine`, and return the number of elements."""
        if name == "B":
            part = self.inputs.of(stored, 1)
        elif name in ("threshold", "norms"):
            part = self.masked.of(stored, 0)
        elif name == "weight":
            part = self._columns(self.inputs.of(stored, 1), 0)
        elif stored.shape == self.stored(name, output)[0]:
            part = self._columns(self.masked.of(stored, 0), 1)
        else:
            index = output - self.first
            part = self.columns[index].of(self.masked.of(stored, 0), 1)
            mine = mine.narrow(1, sum(column.size for column in self.columns[:index]), part.shape[1])
        mine.copy_(part)
        return mine.numel()

    def _columns(self, tensor: Tensor, dim: int) -> Tensor:
        blocks = tensor.split([column.total for column in self.columns], dim)
        return torch.cat([c.of(block, dim) for c, block in zip(self.columns, blocks, strict=True)], dim)


class Pieces:
    """The adapters of one layer in the order of its outputs, and a count of the numbers loaded so far."""

    def __init__(self, prefix: str, pieces: list[Piece]) -> None:
        self.prefix, self.pieces = prefix, pieces
        self._loaded: dict[str, dict[tuple[int, int], int]] = {name: {} for name in NAMES}

    def register(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Give `layer` its empty tensors.

        Thresholds and norms are float32. If rank values are summed over processes, all tensors are float32.
        """
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
        """Return the tensor of adapter number `index`, as a view of the layer's flat tensor."""
        shape = self.pieces[index].shapes[name]
        return flat.narrow(0, self._size(name, index), prod(shape)).view(shape)

    def load(self, name: str, flat: nn.Parameter, stored: Tensor, shard: str | int | None = None) -> None:
        """Copy this process's part of one tensor of the checkpoint. This is vLLM's `weight_loader`.

        shard   the output of a merged layer that the tensor belongs to. None: the only output, or a stacked
                tensor of a RanaMLP, which has up over gate, while vLLM has gate first

        Raises CheckpointError if the tensor does not fit the plan.
        """
        if name == "weight" and stored.numel() == 0:
            return  # every adapted linear has an empty weight, so that other programs do not load it
        if shard is None and len(self.pieces) > 1:
            for index, part in self._unstack(name, stored):
                self._fill(name, flat, part, index, self.pieces[index].first)
        else:
            output = _NUMBERS[shard] if isinstance(shard, str) else shard or 0
            owners = (i for i, p in enumerate(self.pieces) if 0 <= output - p.first < len(p.columns))
            self._fill(name, flat, stored, next(owners), output)

    def _unstack(self, name: str, stored: Tensor) -> list[tuple[int, Tensor]]:
        """Split a stacked tensor of a RanaMLP into (number of the adapter, its part)."""
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
        """Raise CheckpointError unless all tensors were loaded and every threshold is finite and >= 0."""
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
    """Return the parts of `adapters` that this process computes in `layer`.

    names      names in the plan of the linears that the layer computes: one for each output of the layer, or
               one for all outputs
    adapters   the adapters of these linears, each once
    inputs     this process's share of the inputs
    widths     widths of the outputs in this process

    Raises ValueError for sizes that differ from the plan or cannot be divided, and for linears with a joint
    adapter that are not neighbours in the layer.
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
        # with more processes than key heads, several processes have the same head
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
