"""The tensors of one block's adapters, computed from its weights and statistics, by their state-dict names."""

from dataclasses import replace

import torch
from torch import Tensor

from rana_kernels.model.install import is_fused
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.thresholds import threshold_for


def with_threshold(calibrated: CalibratedBlock, adapter: AdapterSpec) -> AdapterSpec:
    """Return the adapter with a threshold: its own, or the one that keeps its `live` rows of the sample."""
    if adapter.kind == "dense" or adapter.threshold is not None:
        return adapter
    if adapter.kind == "rank":
        score = calibrated.rank_scores(adapter.names, adapter.metric)[:, : adapter.rank].abs()
    else:
        norms = calibrated.neuron_norms(adapter.names[0], adapter.metric)
        score = calibrated.sample(calibrated.input_of(adapter.names)).abs() * norms
    threshold, live = threshold_for(score, adapter.live)
    return replace(adapter, threshold=threshold, live=live)


def block_tensors(calibrated: CalibratedBlock, adapters: list[AdapterSpec]) -> dict[str, Tensor]:
    """Return every tensor of the modules of `install.build_block`, except for the empty `weight` of each."""
    block = calibrated.block
    tensors: dict[str, Tensor] = {}
    fused = {*block.expanding, block.down} if is_fused(block, adapters) else set()
    if fused:
        tensors |= _mlp_tensors(calibrated, adapters)
    for adapter in adapters:
        if adapter.kind == "neuron" and adapter.names[0] not in fused:
            tensors |= _neuron_tensors(calibrated, adapter)
        elif adapter.kind == "rank" and adapter.names[0] not in fused:
            tensors |= _rank_tensors(calibrated, adapter)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _rank_thresholds(calibrated: CalibratedBlock, adapter: AdapterSpec) -> Tensor:
    """Return one threshold a rank. The adapter's own is of scores, these are of rank values."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    return adapter.threshold * calibrated.factors(adapter.names, adapter.metric).norms[: adapter.rank]


def _biases(calibrated: CalibratedBlock, owner: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    bias = calibrated.bias(names)
    return {} if bias is None else {f"{owner}.bias": bias.clone()}


def _rank_tensors(calibrated: CalibratedBlock, adapter: AdapterSpec) -> dict[str, Tensor]:
    owner, factors = adapter.names[0], calibrated.factors(adapter.names, adapter.metric)
    return {
        # Clones, because a slice would keep the ranks that are not stored alive.
        f"{owner}.B": factors.B[: adapter.rank].clone(),
        f"{owner}.rows": factors.rows[: adapter.rank].clone(),
        f"{owner}.threshold": _rank_thresholds(calibrated, adapter),
        **_biases(calibrated, owner, adapter.names),
    }


def _neuron_tensors(calibrated: CalibratedBlock, adapter: AdapterSpec) -> dict[str, Tensor]:
    assert adapter.threshold is not None, "compress fills thresholds in first"
    (name,) = adapter.names
    norms = calibrated.neuron_norms(name, adapter.metric)
    return {
        f"{name}.rows": calibrated.weight(adapter.names).T,
        f"{name}.norms": norms,
        f"{name}.threshold": torch.full_like(norms, adapter.threshold),
        **_biases(calibrated, name, adapter.names),
    }


def _mlp_tensors(calibrated: CalibratedBlock, adapters: list[AdapterSpec]) -> dict[str, Tensor]:
    """Stack the ranks of up over those of gate, or take the joint ranks once. Rows keep the names of linears."""
    block = calibrated.block
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    tensors = _neuron_tensors(calibrated, by_name[block.down])
    # The op wants the ranks of up first.
    stack = list(dict.fromkeys(by_name[name] for name in reversed(block.expanding)))
    tensors[f"{block.mlp}.B"] = torch.cat([calibrated.factors(a.names, a.metric).B[: a.rank] for a in stack])
    tensors[f"{block.mlp}.threshold"] = torch.cat([_rank_thresholds(calibrated, a) for a in stack])
    for name in block.expanding:
        adapter = by_name[name]
        place = adapter.names.index(name)
        rows = calibrated.factors(adapter.names, adapter.metric).rows[: adapter.rank]
        tensors[f"{name}.rows"] = rows.split(adapter.out_features, dim=1)[place].clone()
        bias = calibrated.bias(adapter.names)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.split(adapter.out_features)[place].clone()
    return tensors
