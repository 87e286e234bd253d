"""Rounding of one block's weights, each under the second moment of the input that multiplies it.

B and dense weights   GPTQ along the columns, under the moment of the linear's input
rows of neurons       GPTQ along the rows, under the moment of the masked input
rows of ranks         to nearest: the calibration's rank values are not correlated
"""

import torch
from torch import Tensor

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.ops import reference
from rana_kernels.quantization.rounding import quantize
from rana_kernels.statistics.block import CalibratedBlock

INPUTS = ("qkv", "o", "mlp")  # whose statistics rounding needs; the input of down is computed from "mlp"
MASKED_TOKENS = 2  # times the inputs: a smaller sample gives a worse moment than all tokens without a mask


def quantize_block(
    calibrated: CalibratedBlock, adapters: list[AdapterSpec], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors of the block's modules, with the weights in the formats of their adapters.

    tensors   those of `statistics.tensors.block_tensors`, in floats

    The tensors of dense linears that are quantised are added.
    """
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    moments = _Moments(calibrated)
    rounded = dict(tensors)
    for name, weight in tensors.items():
        owner, _, matrix = name.rpartition(".")
        adapter = by_name[owner if owner in by_name else calibrated.block.up]  # a RanaMLP has the B of up
        if matrix == "B" and adapter.format.quantized:
            rounded |= _rounded(name, adapter, weight, moments.of_input(adapter))
        elif matrix == "rows" and adapter.format.quantized:
            moment = moments.of_masked(adapter, tensors) if adapter.kind == "neuron" else None
            rounded |= _rounded(name, adapter, weight, moment, along="rows")
    for adapter in adapters:
        if adapter.kind == "dense" and adapter.format.quantized:
            (name,), bias = adapter.names, calibrated.bias(adapter.names)
            weight = calibrated.weight(adapter.names)
            rounded |= _rounded(f"{name}.qweight", adapter, weight, moments.of_input(adapter))
            rounded |= {} if bias is None else {f"{name}.bias": bias.clone()}
    return rounded


def _rounded(
    name: str, adapter: AdapterSpec, weight: Tensor, moment: Tensor | None, along: str = "columns"
) -> dict[str, Tensor]:
    format = adapter.format.for_rows(weight.shape[1]) if along == "rows" else adapter.format
    try:
        q, scale = quantize(weight, format.bits, format.group, moment, along=along)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {name: q, f"{name}_scale": scale}


class _Moments:
    """The second moments of a block's inputs, each computed once."""

    def __init__(self, calibrated: CalibratedBlock) -> None:
        self.calibrated = calibrated
        self._inputs: dict[str, Tensor] = {}
        self._masked: dict[tuple[str, ...], Tensor] = {}

    def of_input(self, adapter: AdapterSpec) -> Tensor:
        """Return the moment [K, K] of the adapter's input: of all tokens, or of the sample if need be."""
        name = self.calibrated.input_of(adapter.names)
        if name not in self._inputs:
            found = self._of_all_tokens(adapter)
            self._inputs[name] = _moment(self.calibrated.sample(name)) if found is None else found
        return self._inputs[name]

    def of_masked(self, adapter: AdapterSpec, tensors: dict[str, Tensor]) -> Tensor:
        """Return the moment [K, K] of a neuron adapter's input after its mask, from the sample.

        If the sample is small and there is a moment of all tokens, that one is returned, without the mask.
        """
        if adapter.names not in self._masked:
            self._masked[adapter.names] = self._masked_moment(adapter, tensors)
        return self._masked[adapter.names]

    def _masked_moment(self, adapter: AdapterSpec, tensors: dict[str, Tensor]) -> Tensor:
        x = self.calibrated.sample(self.calibrated.input_of(adapter.names))
        if len(x) < MASKED_TOKENS * x.shape[1] and self._of_all_tokens(adapter) is not None:
            return self.of_input(adapter)
        # a RanaMLP has the mask of up and gate itself
        first = adapter.names[0]
        owner = first if f"{first}.norms" in tensors else self.calibrated.block.mlp
        mask = reference.keep(x, tensors[f"{owner}.threshold"], tensors[f"{owner}.norms"])
        return _moment(torch.where(mask, x, 0))

    def _of_all_tokens(self, adapter: AdapterSpec) -> Tensor | None:
        """Return the moment that the calibration summed, or None if it is that of the outputs."""
        key = (self.calibrated.block.index, self.calibrated.input_of(adapter.names))
        found = self.calibrated.stats.inputs.get(key)
        return found.moment if found is not None and len(found.moment) == adapter.in_features else None


def _moment(x: Tensor) -> Tensor:
    return (x.T @ x).double()
