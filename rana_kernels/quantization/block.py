"""Rounding of one block's weights, each under the second moment of the input that multiplies it.

B and dense weights   GPTQ along the columns, under the moment of the linear's input
rows of neurons       GPTQ along the rows, under the moment of the masked input
rows of ranks         to nearest, 8 bits even where B has 4: the calibration's rank values are not correlated
"""

from torch import Tensor

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.quantization.moments import Moments
from rana_kernels.quantization.rounding import quantize
from rana_kernels.statistics.block import CalibratedBlock


def quantize_block(
    calibrated: CalibratedBlock, adapters: list[AdapterSpec], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors of the block's modules, with the weights in the formats of their adapters.

    tensors   those of `statistics.tensors.block_tensors`, in floats

    The tensors of dense linears that are quantised are added.
    """
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    moments = Moments(calibrated)
    rounded = dict(tensors)
    for name, weight in tensors.items():
        owner, _, matrix = name.rpartition(".")
        adapter = by_name[owner if owner in by_name else calibrated.block.up]  # a RanaMLP has the B of up
        if matrix == "B" and adapter.format.quantized:
            rounded |= _rounded(name, adapter, weight, moments.of_input(adapter.names))
        elif matrix == "rows" and adapter.format.quantized:
            moment = _masked_moment(moments, adapter, tensors) if adapter.kind == "neuron" else None
            rounded |= _rounded(name, adapter, weight, moment, along="rows")
    for adapter in adapters:
        if adapter.kind == "dense" and adapter.format.quantized:
            (name,), bias = adapter.names, calibrated.bias(adapter.names)
            weight = calibrated.weight(adapter.names)
            rounded |= _rounded(f"{name}.qweight", adapter, weight, moments.of_input(adapter.names))
            rounded |= {} if bias is None else {f"{name}.bias": bias.clone()}
    return rounded


def _masked_moment(moments: Moments, adapter: AdapterSpec, tensors: dict[str, Tensor]) -> Tensor:
    first = adapter.names[0]
    # a RanaMLP has the mask of up and gate itself
    owner = first if f"{first}.norms" in tensors else moments.calibrated.block.mlp
    return moments.of_masked(adapter.names, tensors[f"{owner}.threshold"], tensors[f"{owner}.norms"])


def _rounded(
    name: str, adapter: AdapterSpec, weight: Tensor, moment: Tensor | None, along: str = "columns"
) -> dict[str, Tensor]:
    format = adapter.rows_format(weight.shape[1]) if along == "rows" else adapter.format
    try:
        q, scale = quantize(weight, format.bits, format.group, moment, along=along)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {name: q, f"{name}_scale": scale}
