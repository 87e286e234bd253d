"""The tensors of one block's adapters, by the names of the state dict they load into."""

from dataclasses import replace

import torch
from torch import Tensor

from rana_kernels.install import is_fused
from rana_kernels.layer import Layer
from rana_kernels.methods.split import threshold_for
from rana_kernels.plan import Adapter


def with_threshold(layer: Layer, adapter: Adapter) -> Adapter:
    """The adapter with a threshold; one without gets that which keeps its `live` rows of the sample."""
    if adapter.kind == "dense" or adapter.threshold is not None:
        return adapter
    if adapter.kind == "rank":
        score = layer.rank_scores(adapter.names, adapter.metric)[:, : adapter.rank].abs()
    else:
        scale = layer.scale(adapter.names[0], adapter.metric)
        score = layer.sample(layer.input_of(adapter.names)).abs() * scale
    threshold, live = threshold_for(score, adapter.live)
    return replace(adapter, threshold=threshold, live=live)


def block_tensors(layer: Layer, adapters: list[Adapter]) -> dict[str, Tensor]:
    """Everything that the modules of `install.build_block` hold, computed from the layer's weights."""
    block = layer.block
    tensors: dict[str, Tensor] = {}
    fused = {*block.expanding, block.down} if is_fused(block, adapters) else set()
    if fused:
        tensors |= _mlp_tensors(layer, adapters)
    for adapter in adapters:
        if adapter.kind == "neuron" and adapter.names[0] not in fused:
            tensors |= _neuron_tensors(layer, adapter)
        elif adapter.kind == "rank" and adapter.names[0] not in fused:
            tensors |= _rank_tensors(layer, adapter)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _rank_thresholds(layer: Layer, adapter: Adapter) -> Tensor:
    """One for each rank: the adapter's, which is of scores, in terms of h."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    return adapter.threshold * layer.factors(adapter.names, adapter.metric).norms[: adapter.rank]


def _sentinels(layer: Layer, names: tuple[str, ...]) -> dict[str, Tensor]:
    # see modules.py: an empty tensor under the original name makes a plain loader stop
    return {f"{name}.weight": layer.linear(name).weight.detach().new_empty(0) for name in names}


def _biases(layer: Layer, owner: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    bias = layer.bias(names)
    return {} if bias is None else {f"{owner}.bias": bias.clone()}


def _rank_tensors(layer: Layer, adapter: Adapter) -> dict[str, Tensor]:
    owner, factors = adapter.names[0], layer.factors(adapter.names, adapter.metric)
    return {
        # clones: a slice would keep the ranks that are not stored alive
        f"{owner}.B": factors.B[: adapter.rank].clone(),
        f"{owner}.rows": factors.rows[: adapter.rank].clone(),
        f"{owner}.threshold": _rank_thresholds(layer, adapter),
        **_biases(layer, owner, adapter.names),
        **_sentinels(layer, adapter.names),
    }


def _neuron_tensors(layer: Layer, adapter: Adapter) -> dict[str, Tensor]:
    assert adapter.threshold is not None, "compress fills thresholds in first"
    (name,) = adapter.names
    scale = layer.scale(name, adapter.metric)
    return {
        f"{name}.rows": layer.weight(adapter.names).T,
        f"{name}.scale": scale,
        f"{name}.threshold": torch.full_like(scale, adapter.threshold),
        **_biases(layer, name, adapter.names),
        **_sentinels(layer, adapter.names),
    }


def _mlp_tensors(layer: Layer, adapters: list[Adapter]) -> dict[str, Tensor]:
    """Up's ranks over gate's, or the ranks that they share; the rows stay with each linear's name."""
    block = layer.block
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    tensors = _neuron_tensors(layer, by_name[block.down])
    # up's ranks first
    stack = list(dict.fromkeys(by_name[name] for name in reversed(block.expanding)))
    tensors[f"{block.mlp}.B"] = torch.cat([layer.factors(a.names, a.metric).B[: a.rank] for a in stack])
    tensors[f"{block.mlp}.threshold"] = torch.cat([_rank_thresholds(layer, a) for a in stack])
    for name in block.expanding:
        adapter = by_name[name]
        rows = layer.factors(adapter.names, adapter.metric).rows[: adapter.rank]
        parts = rows.split(adapter.out_features, dim=1)
        tensors[f"{name}.rows"] = parts[adapter.names.index(name)].clone()
        bias = layer.bias(adapter.names)
        if bias is not None:
            part = bias.split(adapter.out_features)[adapter.names.index(name)]
            tensors[f"{name}.bias"] = part.clone()
        tensors |= _sentinels(layer, (name,))
    return tensors
