"""Rounding of one block's weights, each under the second moment of the input that multiplies it.

B and dense weights   GPTQ along the columns, under the moment of the linear's input
rows of neurons       GPTQ along the rows, under the moment of the masked input
rows of ranks         refitted to the rounded B, then to nearest, in 8 bits even where B has 4: the
                      calibration's rank values are not correlated, so no row makes good the error of another
"""

from torch import Tensor

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization.moments import Moments
from rana_kernels.quantization.refit import refit
from rana_kernels.quantization.rounding import quantize
from rana_kernels.statistics.block import CalibratedBlock


def quantize_block(
    calibrated: CalibratedBlock, adapters: list[AdapterSpec], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors of the block's modules, with the weights in the formats of their adapters.

    tensors   those of `statistics.tensors.block_tensors`, in floats

    The tensors of dense linears that are quantised are added.
    """
    rounding = _BlockRounding(calibrated, adapters, tensors)
    for name in tensors:
        if name.endswith(".B"):
            rounding.round_B(name)
    for name in tensors:
        if name.endswith(".rows"):
            rounding.round_rows(name)
    for adapter in adapters:
        if adapter.kind == "dense":
            rounding.round_dense(adapter)
    return rounding.rounded


class _BlockRounding:
    """The tensors of one block, some of which are rounded already. All B come before any rows."""

    def __init__(
        self, calibrated: CalibratedBlock, adapters: list[AdapterSpec], tensors: dict[str, Tensor]
    ) -> None:
        self.calibrated, self.block, self.tensors = calibrated, calibrated.block, tensors
        self.by_name = {name: adapter for adapter in adapters for name in adapter.names}
        self.moments, self.rounded = Moments(calibrated), dict(tensors)

    def round_B(self, name: str) -> None:
        owner = name.rpartition(".")[0]
        adapter = self.by_name[owner if owner in self.by_name else self.block.up]  # a RanaMLP has that of up
        if not adapter.format.quantized:
            return
        self._round(name, adapter, self.tensors[name], self.moments.of_input(adapter.names))

    def round_rows(self, name: str) -> None:
        owner, rows = name.rpartition(".")[0], self.tensors[name]
        adapter = self.by_name[owner]
        if not adapter.format.quantized:
            return
        # a RanaMLP has the rows of joint linears apart
        names = adapter.names if rows.shape[1] == adapter.width else (owner,)
        moment = None
        if adapter.kind == "neuron":
            mask = self._owner_of(adapter, "norms")
            threshold, norms = (self.tensors[f"{mask}.{part}"] for part in ("threshold", "norms"))
            moment = self.moments.of_masked(adapter.names, threshold, norms)
        else:
            rows = self._refitted(adapter, names, rows)
        self._round(name, adapter, rows, moment, "rows")

    def round_dense(self, adapter: AdapterSpec) -> None:
        if not adapter.format.quantized:
            return
        (name,), bias = adapter.names, self.calibrated.bias(adapter.names)
        weight = self.calibrated.weight(adapter.names)
        self._round(f"{name}.qweight", adapter, weight, self.moments.of_input(adapter.names))
        self.rounded |= {} if bias is None else {f"{name}.bias": bias.clone()}

    def _owner_of(self, adapter: AdapterSpec, tensor: str) -> str:
        """Return the module that has this tensor: that of the first linear, or a RanaMLP."""
        first = adapter.names[0]
        return first if f"{first}.{tensor}" in self.tensors else self.block.mlp

    def _refitted(self, adapter: AdapterSpec, names: tuple[str, ...], rows: Tensor) -> Tensor:
        """Return the rows of linears `names` of a rank adapter, refitted to its rounded B."""
        owner, start = self._owner_of(adapter, "B"), 0
        if owner == self.block.mlp and adapter is not self.by_name[self.block.up]:
            start = self.by_name[self.block.up].rank  # a RanaMLP has the ranks of up first
        own = slice(start, start + adapter.rank)
        B, scale = self.rounded[f"{owner}.B"][own], self.rounded[f"{owner}.B_scale"][own]
        x = self.calibrated.sample(self.calibrated.input_of(names))
        wanted = x @ self.calibrated.weight(names).float().T
        threshold = self.tensors[f"{owner}.threshold"][own]
        return refit(x, dequantize(B, scale, x.shape[1]), threshold, rows, wanted)

    def _round(
        self, name: str, adapter: AdapterSpec, weight: Tensor, moment: Tensor | None, along: str = "columns"
    ) -> None:
        format = adapter.rows_format(weight.shape[1]) if along == "rows" else adapter.format
        try:
            q, scale = quantize(weight, format.bits, format.group, moment, along=along)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.rounded |= {name: q, f"{name}_scale": scale}
