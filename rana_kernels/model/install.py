"""The replacement of a model's linears by the modules of a Plan, which gives their sizes.

A checkpoint loader calls `install`: it builds every module empty, on the device and in the dtype of the
linears that it replaces (the meta device included). The loader then fills it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from rana_kernels.model.architectures import Block, architecture, decoder_name, decoder_paths, find_blocks
from rana_kernels.model.head import head_names, is_tied, require_head
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import joint_linears
from rana_kernels.nn.base import fill_module
from rana_kernels.nn.dense import QuantizedLinear, serve_dense
from rana_kernels.nn.mlp import RanaMLP


def install(model: nn.Module, plan: Plan) -> None:
    """Replace the linears of `model` by empty modules with the sizes of `plan`, in place.

    Raises ValueError, before anything is replaced, if the plan does not fit the model.
    """
    for block, adapters in check_plan(model, find_blocks(model), plan):
        like = linear_of(model, block.linears[0]).weight
        replace_modules(model, build_block(block, adapters, like.device, like.dtype))
    if plan.lm_head is not None:
        replace_modules(model, build_head(model, plan.lm_head))
    serve_dense(model, dense_names(model, plan))


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with the names that its linears have in `model`.

    They begin otherwise in another class of the same architecture: a headless model has no `model.` before
    its layers. It has no lm_head either.
    """
    here, layers = decoder_name(model), architecture(model).layers
    starts = {path: ".".join(filter(None, [path, layers, ""])) for path in decoder_paths(model)}
    names = [name for adapter in plan.adapters for name in adapter.names]
    for path, start in starts.items():
        if path != here and names and all(name.startswith(start) for name in names):
            renamed = {name: starts[here] + name.removeprefix(start) for name in names}
            adapters = (replace(a, names=tuple(renamed[name] for name in a.names)) for a in plan.adapters)
            plan = plan.with_adapters(tuple(adapters))
            break
    return plan if head_names(model) else replace(plan, lm_head=None)


def dense_names(model: nn.Module, plan: Plan) -> list[str]:
    """Return the dense linears of floats: those in the plan, and lm_head if the model has one."""
    own = [a.names[0] for a in plan.adapters if a.kind == "dense" and not a.format.quantized]
    return own + (head_names(model) if plan.lm_head is None else [])


def build_head(model: nn.Module, adapter: AdapterSpec) -> dict[str, nn.Module]:
    """Return the empty module that replaces lm_head, by full name.

    Raises ValueError unless the model has an lm_head that fits `adapter` and has a weight of its own.
    """
    block = require_head(model)
    if adapter.names != (block.head,):
        raise ValueError(f"the plan has {adapter.names} as lm_head, the model {block.head}")
    check_adapter(model, block, adapter)
    if is_tied(model):
        raise ValueError(f"{block.head} is tied to the embedding, wanted one of its own to replace")
    like = linear_of(model, block.head).weight
    return build_block(block, [adapter], like.device, like.dtype)


def install_block(
    model: nn.Module, block: Block, adapters: list[AdapterSpec], tensors: dict[str, Tensor]
) -> None:
    """Build the modules of a block on the meta device, give them their tensors, and replace its linears."""
    weight = linear_of(model, block.linears[0]).weight
    modules = build_block(block, adapters, "meta", weight.dtype)
    for name, module in modules.items():
        prefix = f"{name}."
        own = {
            k.removeprefix(prefix): t.to(weight.device) for k, t in tensors.items() if k.startswith(prefix)
        }
        fill_module(module, **own)
    replace_modules(model, modules)


def replace_modules(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Replace the modules of `model` with these full names."""
    for name, module in modules.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)


def check_plan(model: nn.Module, blocks: list[Block], plan: Plan) -> list[tuple[Block, list[AdapterSpec]]]:
    """Return each block with its adapters. Raise ValueError if `plan` and `model` do not fit."""
    left = {name: adapter for adapter in plan.adapters for name in adapter.names}
    pairs = []
    for block in blocks:
        missing = [name for name in block.linears if name not in left]
        if missing:
            raise ValueError(
                f"the plan has nothing for {', '.join(missing)}, wanted every linear of the blocks"
            )
        adapters = list(dict.fromkeys(left.pop(name) for name in block.linears))
        for adapter in adapters:
            check_adapter(model, block, adapter)
        pairs.append((block, adapters))
    if left:
        raise ValueError(f"the plan has {', '.join(left)}, which are no linears of this model's blocks")
    return pairs


def check_adapter(model: nn.Module, block: Block, adapter: AdapterSpec) -> None:
    """Raise ValueError if an adapter does not fit the linears of its block."""
    linears = [linear_of(model, name) for name in adapter.names]
    K, widths = linears[0].in_features, tuple(linear.out_features for linear in linears)
    if (adapter.in_features, adapter.out_features) != (K, widths):
        raise ValueError(
            f"{adapter.names}: the plan has {adapter.in_features} -> {adapter.out_features}, "
            f"the model {K} -> {widths}"
        )
    if adapter.bias != any(linear.bias is not None for linear in linears):
        raise ValueError(f"{adapter.names}: the plan has bias={adapter.bias}, the model the opposite")
    together = [readers for readers in block.inputs.values() if set(adapter.names) <= set(readers)]
    if not together or tuple(n for n in block.linears if n in adapter.names) != adapter.names:
        raise ValueError(
            f"{adapter.names}: a joint adapter takes linears that read the same input, in the order in "
            f"which the model calls them: {', '.join(block.linears)}"
        )


def is_fused(block: Block, adapters: list[AdapterSpec]) -> bool:
    """Say whether one RanaMLP can replace the whole MLP of the block.

    It can if up and gate have rank adapters (separate or joint) of one format or a joint neuron adapter, down
    has a neuron adapter, and the op has the activation. Where one linear computes both up and gate, a group
    must not contain columns of both.
    """
    if not block.mlp or block.activation is None:
        return False
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    first, down = [by_name[name] for name in block.expanding], by_name[block.down]
    if down.kind != "neuron":
        return False
    if first[0].kind == "neuron":
        return len(first[0].names) > 1  # a neuron adapter of one linear keeps the norms of its own rows
    if {adapter.kind for adapter in first} != {"rank"}:
        return False
    splits = block.gate != block.up or first[0].format.splits_at(first[0].width // 2)
    return len({adapter.format for adapter in first}) == 1 and splits


def build_block(
    block: Block, adapters: list[AdapterSpec], device: torch.device | str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return the empty modules that replace linears of one block, by full name."""
    place = {"device": device, "dtype": dtype}
    modules: dict[str, nn.Module] = {}
    fused = {*block.expanding, block.down} if is_fused(block, adapters) else set()
    if fused:
        modules[block.mlp] = _build_mlp(block, adapters, place)
    for adapter in adapters:
        if adapter.names[0] not in fused:
            modules |= _build_adapter(adapter, place)
    return modules


def _build_adapter(adapter: AdapterSpec, place: dict) -> dict[str, nn.Module]:
    K, format, made = adapter.in_features, adapter.format, []
    if adapter.kind != "dense":
        rank = adapter.rank if adapter.kind == "rank" else None
        made = joint_linears(K, adapter.out_features, rank, adapter.bias, format=format, **place)
    elif format.quantized:
        made = [QuantizedLinear(K, adapter.width, adapter.bias, format, **place)]
    return dict(zip(adapter.names, made, strict=False))  # a dense linear of floats stays


def _build_mlp(block: Block, adapters: list[AdapterSpec], place: dict) -> RanaMLP:
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    up, gate, down = by_name[block.up], by_name.get(block.gate), by_name[block.down]
    up_name, gate_name, down_name = (n.rpartition(".")[2] for n in (block.up, block.gate, block.down))
    assert block.activation is not None, "is_fused says so"
    return RanaMLP(
        up.in_features,
        down.in_features,
        down.width,
        up.rank,
        gate.rank if gate else None,
        block.activation,
        kind=up.kind,
        joint=up is gate,
        bias=(up.bias, gate is not None and gate.bias, down.bias),
        names=(up_name, gate_name, down_name),
        format=up.format,
        down_format=down.format,
        **place,
    )
