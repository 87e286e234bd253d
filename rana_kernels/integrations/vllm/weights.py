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


class Pieces:
    """The adapters of one layer in the order of its outputs, and a count of the numbers loaded so far.

    apart   the numbers of those with quantised rows that are stored once for each output. They stay apart,
            because a group of columns would belong to two outputs
    """

    def __init__(self, prefix: str, pieces: list[Piece]) -> None:
        self.prefix, self.pieces, self.apart = prefix, pieces, set[int]()
        self._bytes = any(piece.adapter.format.quantized for piece in pieces)
        self._loaded: dict[str, dict[tuple[int, int], int]] = {name: {} for name in NAMES}

    def register(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Give `layer` its empty tensors.

        Thresholds and norms are float32. If rank values are summed over processes, all tensors are float32.
        """
        scattered = any(piece.scattered for piece in self.pieces)
        self._floats = torch.float32 if scattered else dtype
        for name in NAMES:
            flat = torch.uint8 if self._in_bytes(name) else self._dtype(name)
            data = torch.zeros(self._place(name, len(self.pieces)), dtype=flat)
            parameter = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self.load, name)})
            layer.register_parameter(name, parameter)

    def _in_bytes(self, name: str) -> bool:
        return self._bytes and name in MATRICES

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype of what is no whole number."""
        return torch.float32 if name in VECTORS else torch.float16 if name in SCALES else self._floats

    def _place(self, name: str, index: int) -> int:
        """Return where the tensor of adapter number `index` begins in the flat tensor, or where that ends."""
        return sum(self._room(name, piece) for piece in self.pieces[:index] if name in piece.held)

    def _room(self, name: str, piece: Piece) -> int:
        """Return the room of one adapter in a flat tensor, whether its rows are stored apart or not."""
        whole, apart = self._units(name, piece.held[name]), 0
        if piece.adapter.format.quantized:
            outputs = range(piece.first, piece.first + len(piece.columns))
            apart = sum(self._units(name, piece.held_of(output)[name]) for output in outputs)
        return max(whole, apart) if name in ROWS else whole

    def _units(self, name: str, held: Held) -> int:
        count = prod(held.shape)
        if not self._in_bytes(name):
            return count
        return -(-count * (held.dtype or self._floats).itemsize // ALIGNED) * ALIGNED

    def view(self, flat: Tensor, name: str, index: int, output: int | None = None) -> Tensor | None:
        """Return the tensor of adapter number `index`, a view of the layer's flat tensor, if it has one.

        output   that of the rows, for an adapter in `apart`
        """
        piece, start = self.pieces[index], self._place(name, index)
        held = piece.held.get(name)
        if held is None:
            return None
        if output is not None and name in ROWS:
            before = range(piece.first, output)
            start += sum(self._units(name, piece.held_of(other)[name]) for other in before)
            held = piece.held_of(output)[name]
        dtype = held.dtype or self._dtype(name)
        units = prod(held.shape) * (dtype.itemsize if self._in_bytes(name) else 1)
        return flat.narrow(0, start, units).view(dtype).view(held.shape)

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
        piece = self.pieces[index]
        if name in ROWS and index in self.apart:
            outputs = range(piece.first, piece.first + len(piece.columns))
            return sum(prod(piece.held_of(output)[name].shape) for output in outputs)
        return prod(piece.held[name].shape) if name in piece.held else 0


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
