"""The computation of one vLLM layer: one op for each adapter, with the outputs side by side."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_reduce_scatter
from vllm.model_executor.layers.linear import LinearMethodBase

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.integrations.vllm.pieces import Piece, Share
from rana_kernels.integrations.vllm.weights import Pieces, pieces_of
from rana_kernels.model.plan import AdapterSpec


class RanaLinearMethod(LinearMethodBase):
    """The method of one layer of vLLM.

    names      names in the plan of the linears that the layer computes
    adapters   the adapters of these linears, each once
    """

    pieces: Pieces

    def __init__(self, names: list[str], adapters: list[AdapterSpec]) -> None:
        self.names, self.adapters = names, adapters

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Give the layer empty tensors for its adapters. Raise ValueError if the plan does not fit it."""
        split = input_size_per_partition < input_size
        start = layer.tp_rank * input_size_per_partition if split else 0
        inputs = Share(start, input_size_per_partition, input_size)
        self.pieces = pieces_of(layer, self.names, self.adapters, inputs, output_partition_sizes)
        self.pieces.register(layer, params_dtype)
        joint = [adapter for adapter in self.adapters if adapter.bias and len(adapter.names) > 1]
        if joint and len(self.adapters) > 1:
            raise ValueError(
                f"{layer.prefix}: {', '.join(joint[0].names)} share an adapter and have a bias, and "
                "vLLM's layer computes others too. Compress the model with another plan"
            )
        if joint:  # vLLM creates the bias later, and loads it with the layer's loader
            layer.weight_loader = partial(_load_bias, layer.weight_loader, joint[0].width)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise CheckpointError if any tensor was not loaded."""
        self.pieces.check(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the output of the layer."""
        outputs, column = [], 0
        for i, piece in enumerate(self.pieces.pieces):
            for output, width in self._parts(i, piece):
                part = None if bias is None else bias[column : column + width]
                outputs.append(self._compute(layer, i, output, x, part))
                column += width
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _parts(self, index: int, piece: Piece) -> list[tuple[int | None, int]]:
        """Return (output or None for all, width) for each op call of an adapter."""
        if index not in self.pieces.apart:
            return [(None, piece.width)]
        return [(i, column.size) for i, column in zip(piece.outputs, piece.columns, strict=True)]

    def _compute(
        self, layer: nn.Module, index: int, output: int | None, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        piece = self.pieces.pieces[index]

        def own(name: str) -> Any:
            return self.pieces.view(getattr(layer, name), name, index, output)

        if piece.adapter.kind == "dense":
            if piece.adapter.format.quantized:
                return torch.ops.rana.linear(x, own("qweight"), bias, own("qweight_scale"))
            return F.linear(x, own("weight"), bias)
        rows, threshold, scale = own("rows"), own("threshold"), own("rows_scale")
        if piece.adapter.kind == "neuron":
            return torch.ops.rana.masked_linear(x, rows, threshold, own("norms"), bias, scale)
        if not piece.scattered:
            return torch.ops.rana.masked_lowrank_linear(
                x, own("B"), rows, threshold, bias, own("B_scale"), scale
            )
        # the mask is decided on the sum over all processes, not on each process's part of it
        h = tensor_model_parallel_reduce_scatter(F.linear(x.float(), own("B")))
        wide_bias = None if bias is None else bias.float()
        return torch.ops.rana.masked_linear(h, rows, threshold, None, wide_bias).to(x.dtype)


def _load_bias(load, total: int, bias: nn.Parameter, stored: Tensor, shard: str | int | None = None) -> None:
    """Load a bias. A joint adapter stores the bias of all its linears under the first of them."""
    load(bias, stored, None if stored.shape[0] == total else shard)
