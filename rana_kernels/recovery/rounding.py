"""The rounding of a recovered model: its trained factors get the formats of the plan again.

It follows `quantization/block.py`, with the inputs of the modules as they are in the recovered model. One
pass is enough: each module is rounded before it runs, on the outputs of the modules that were rounded before.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.model.install import build_block, is_fused, replace_modules
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.base import fill_module
from rana_kernels.nn.factored import FactoredLinear, FactoredNeurons
from rana_kernels.nn.format import Format
from rana_kernels.ops import reference
from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization.moments import MASKED_TOKENS, moment_of
from rana_kernels.quantization.refit import refit as refit_rows
from rana_kernels.quantization.rounding import quantize


@dataclass
class Rounding:
    """The rounded weights of a model, which it collects.

    plan    the plan of the model before its recovery
    names   the modules with quantised weights
    dtype   the dtype of the floats of these modules
    apart   the linears of a RanaMLP: the rows of joint linears are apart there
    scales  of the model before its recovery. They are kept: with new ones, values that training has hardly
            changed would be rounded a second time
    tensors B, rows, qweight and their scales, by the names of their linears
    """

    plan: Plan
    names: list[str]
    dtype: torch.dtype
    apart: set[str]
    scales: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def round_B(self, module: FactoredLinear, spec: AdapterSpec, x: Tensor) -> None:
        weight = self._round(f"{spec.names[0]}.B", module.B.weight, spec.format, moment_of(x))
        module.B.weight.copy_(weight)

    def round_ranks(self, module: FactoredLinear, spec: AdapterSpec, x: Tensor, wanted: Tensor) -> None:
        """Refit the rows of ranks to the rounded B, so that they give `wanted`, and round them."""
        name = f"{spec.names[0]}.B"
        B = dequantize(self.tensors[name], self.tensors[f"{name}_scale"], x.shape[1])
        rows = refit_rows(x, B, module.threshold, module.rows.weight.T.float(), wanted)
        self._round_rows(module.rows, spec, rows, None)

    def round_neurons(self, module: FactoredNeurons, spec: AdapterSpec, x: Tensor) -> None:
        seen = torch.where(reference.keep(x, module.threshold, module.norms), x, 0)
        moment = moment_of(x if len(x) < MASKED_TOKENS * x.shape[1] else seen)
        self._round_rows(module.rows, spec, module.rows.weight.T, moment)

    def round_dense(self, linear: nn.Linear, spec: AdapterSpec, x: Tensor) -> None:
        weight = self._round(f"{spec.names[0]}.qweight", linear.weight, spec.format, moment_of(x))
        linear.weight.copy_(weight)

    def _round_rows(self, linear: nn.Linear, spec: AdapterSpec, rows: Tensor, moment: Tensor | None) -> None:
        whole = spec.names[0] not in self.apart
        names, widths = (spec.names[:1], [rows.shape[1]]) if whole else (spec.names, list(spec.out_features))
        parts = [
            self._round(f"{name}.rows", part.contiguous(), spec.rows_format(part.shape[1]), moment, "rows")
            for name, part in zip(names, rows.split(widths, 1), strict=True)
        ]
        linear.weight.copy_(torch.cat(parts, 1).T)

    def _round(
        self, name: str, weight: Tensor, format: Format, moment: Tensor | None, along: str = "columns"
    ) -> Tensor:
        """Keep the rounded weight, and return its floats."""
        kept = self.scales[f"{name}_scale"]
        q, scale = quantize(weight, format.bits, format.group, moment, along=along, scale=kept)
        self.tensors |= {name: q, f"{name}_scale": scale}
        return dequantize(q, scale, weight.shape[1])


def outputs(module: FactoredLinear, x: Tensor) -> Tensor:
    """Return the outputs of a rank adapter without the bias, from float32 rank values."""
    h = x @ module.B.weight.float().T
    return torch.where(reference.keep(h, module.threshold), h, 0) @ module.rows.weight.float().T


def rounding_of(model: nn.Module) -> Rounding | None:
    """Return an empty Rounding for a compressed model, or None if no linear of its blocks is quantised."""
    plan = attached_plan(model)
    if plan is None or not any(adapter.format.quantized for adapter in plan.adapters):
        return None
    names, apart = [], set[str]()
    scales = {name: t for name, t in model.state_dict().items() if name.endswith("_scale")}
    for block, adapters in _adapters(model, plan):
        fused = {*block.expanding, block.down} if is_fused(block, adapters) else set()
        names += [block.mlp] if fused else []
        names += [a.names[0] for a in adapters if a.format.quantized and a.names[0] not in fused]
        apart |= fused
        if f"{block.mlp}.B_scale" in scales:
            stack = _stacked(block, adapters)
            parts = scales[f"{block.mlp}.B_scale"].split([adapter.rank for adapter in stack])
            scales |= {f"{a.names[0]}.B_scale": part for a, part in zip(stack, parts, strict=True)}
    embedding: Any = getattr(model, "get_input_embeddings", None)
    return Rounding(plan, names, embedding().weight.dtype, apart, scales)


def tokens_for_rounding(plan: Plan) -> int:
    """Return how many tokens the moments need: a few for each input of the widest quantised linear."""
    widths = [adapter.in_features for adapter in plan.adapters if adapter.format.quantized]
    return MASKED_TOKENS * max(widths, default=0)


@torch.no_grad()
def install_rounded(model: nn.Module, rounding: Rounding) -> None:
    """Replace the float modules of `model` by modules with the rounded weights."""
    plan = attached_plan(model)
    assert plan is not None, "only compressed models are recovered"
    for block, adapters in _adapters(model, plan):
        tensors = dict(rounding.tensors)
        if is_fused(block, adapters):
            stack = _stacked(block, adapters)
            for kind in ("B", "B_scale"):
                parts = [tensors[key] for a in stack if (key := f"{a.names[0]}.{kind}") in tensors]
                tensors |= {f"{block.mlp}.{kind}": torch.cat(parts)} if parts else {}
        modules = build_block(block, adapters, "meta", rounding.dtype)
        for name, module in modules.items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            names = set(module.state_dict())
            kept = {k: t for k, t in model.get_submodule(name).state_dict().items() if k in names}
            fill_module(module, **{k: t for k, t in {**kept, **own}.items() if k in names})
        replace_modules(model, modules)


def _stacked(block: Block, adapters: list[AdapterSpec]) -> list[AdapterSpec]:
    """Return the adapters of up and gate in the order of B of a RanaMLP: up first."""
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    return list(dict.fromkeys(by_name[name] for name in reversed(block.expanding)))


def _adapters(model: nn.Module, plan: Plan) -> list[tuple[Block, list[AdapterSpec]]]:
    """Return each block with its adapters."""
    by_name = {name: adapter for adapter in plan.adapters for name in adapter.names}
    blocks = find_blocks(model)
    return [(block, list(dict.fromkeys(by_name[name] for name in block.linears))) for block in blocks]
