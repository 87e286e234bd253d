"""The tensors of one vLLM layer: how those of several adapters are packed, and which part a process holds.

A layer has flat tensors with the names of the checkpoint (NAMES). Each contains the tensors of all adapters
of the layer, one after the other, so their ranks may differ. `weight` and `qweight` contain the dense
linears, in floats and in 8 or 4 bits. Where a layer has quantised weights, its flat weights are bytes.

With tensor parallelism over P processes:

    column-parallel    A process has all of B and its columns of `rows`. All processes decide the same mask
                       on the same bits, and nothing is sent.
    row-parallel       Neuron adapter: a process has its own neurons, and nothing is sent.
                       Rank adapter: a process has its columns of B and 1/P of the ranks, in float32. A
                       reduce-scatter of 4·R bytes a token sums h over the processes before it is masked.

After a row-parallel layer, vLLM itself also sums y over the processes. Quantised weights are not shared out.
"""

from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase
from vllm.model_executor.utils import set_weight_attrs

from rana_kernels.checkpoint.headers import CheckpointError
from rana_kernels.integrations.vllm.pieces import ROWS, Held, Piece, Share
from rana_kernels.model.plan import AdapterSpec

MATRICES = ("B", "rows", "weight", "qweight")
SCALES = ("B_scale", "rows_scale", "qweight_scale")
VECTORS = ("threshold", "norms")  # float32
NAMES = (*MATRICES, *SCALES, *VECTORS)
ALIGNED = 64  # bytes: where the weights of an adapter begin among those of others
_NUMBERS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the outputs of a merged layer


class Place(NamedTuple):
    """Where a tensor lies in a flat one: `units` elements of it, which are bytes if it has whole numbers."""

    start: int
    units: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Pieces:
    """The adapters of one layer in the order of its outputs, and a count of the numbers loaded so far.

    apart   the numbers of those with quantised rows that are stored once for each output. They stay apart,
            because a group of columns would belong to two outputs
    """

    def __init__(self, prefix: str, pieces: list[Piece]) -> None:
        self.prefix, self.pieces, self.apart = prefix, pieces, set[int]()
        self._bytes = any(piece.adapter.format.quantized for piece in pieces)
        self._places: dict[tuple[str, int, int | None], Place] = {}  # by name, adapter, and output if apart
        self._loaded: dict[str, dict[tuple[int, int], int]] = {name: {} for name in NAMES}

    def register(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Give `layer` its empty tensors.

        Thresholds and norms are float32. If rank values are summed over processes, all tensors are float32.
        """
        scattered = any(piece.scattered for piece in self.pieces)
        for name in NAMES:
            floats = torch.float32 if scattered or name in VECTORS else dtype
            floats = torch.float16 if name in SCALES else floats
            in_bytes = self._bytes and name in MATRICES
            data = torch.zeros(
                self._lay_out(name, floats, in_bytes), dtype=torch.uint8 if in_bytes else floats
            )
            parameter = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self.load, name)})
            layer.register_parameter(name, parameter)

    def _lay_out(self, name: str, floats: torch.dtype, in_bytes: bool) -> int:
        """Find the places of all adapters in the flat tensor `name`, and return its size.

        Quantised rows get room for both ways to store them: once for all outputs, and once for each.
        """
        end = 0
        for index, piece in enumerate(self.pieces):
            ways: list[dict[int | None, dict[str, Held]]] = [{None: piece.held}]
            if name in ROWS and piece.adapter.format.quantized:
                ways.append({output: piece.held_of(output) for output in piece.outputs})
            end = max(self._lay_one(name, index, way, end, floats, in_bytes) for way in ways)
        return end

    def _lay_one(
        self,
        name: str,
        index: int,
        way: dict[int | None, dict[str, Held]],
        start: int,
        floats: torch.dtype,
        in_bytes: bool,
    ) -> int:
        """Place the tensors of one adapter one after the other from `start`, and return where they end."""
        for output, tensors in way.items():
            held = tensors.get(name)
            if held is not None:
                dtype = held.dtype or floats
                units = prod(held.shape) * (dtype.itemsize if in_bytes else 1)
                self._places[name, index, output] = Place(start, units, held.shape, dtype)
                start += -(-units // ALIGNED) * ALIGNED if in_bytes else units
        return start

    def view(self, flat: Tensor, name: str, index: int, output: int | None = None) -> Tensor | None:
        """Return the tensor of adapter number `index`, a view of the layer's flat tensor, if it has one.

        output   that of the rows, for an adapter in `apart`
        """
        place = self._places.get((name, index, output if name in ROWS else None))
        if place is None:
            return None
        return flat.narrow(0, place.start, place.units).view(place.dtype).view(place.shape)

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
        is_apart = tuple(stored.shape) != wanted[0] and piece.adapter.format.quantized
        if is_apart:
            self.apart.add(index)
        mine = self.view(flat.data, name, index, output if is_apart else None)
        assert mine is not None, "its shapes are those wanted"
        self._loaded[name][index, output] = piece.fill(name, mine, stored, output)

    def check(self, layer: nn.Module) -> None:
        """Raise CheckpointError unless all tensors were loaded, every threshold is finite and >= 0, and every
        scale finite.
        """
        for name in NAMES:
            wanted = sum(self._count(name, i) for i in range(len(self.pieces)))
            found = sum(self._loaded[name].values())
            if found != wanted:
                raise CheckpointError(f"{self.prefix}: {found} of {wanted} numbers of {name} were loaded")
        threshold = layer.get_parameter("threshold")
        if not (threshold.isfinite() & (threshold >= 0)).all():
            raise CheckpointError(f"{self.prefix}: a threshold is negative or not finite")
        for name in SCALES:
            if not layer.get_parameter(name).isfinite().all():
                raise CheckpointError(f"{self.prefix}: {name} has values that are not finite")

    def _count(self, name: str, index: int) -> int:
        """Return how many numbers adapter number `index` has in the checkpoint."""
        is_apart = name in ROWS and index in self.apart
        outputs = self.pieces[index].outputs if is_apart else (None,)
        places = (self._places.get((name, index, output)) for output in outputs)
        return sum(prod(place.shape) for place in places if place is not None)


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
    if adapter.format.quantized and layer.tp_size > 1:
        raise ValueError(
            f"{layer.prefix}: {', '.join(adapter.names)} have {adapter.bits} bits, and {layer.tp_size} "
            "processes would share their groups: set tensor_parallel_size=1, or compress the original model "
            "with bits=16"
        )
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
