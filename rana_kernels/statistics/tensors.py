"""The tensors of one block's adapters, by state-dict name, made from the block's weights and statistics."""

from dataclasses import replace

import torch
from torch import Tensor

from rana_kernels.model.install import is_fused
from rana_kernels.model.plan import AdapterSpec, Setting
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.thresholds import thresholds_for


def with_threshold(calibrated: CalibratedBlock, adapter: AdapterSpec) -> AdapterSpec:
    """Return the adapter with its threshold and those of its settings.

    One that is missing is chosen so that it keeps `live` rows a token of the calibration sample.
    """
    masks = [Setting(adapter.live, adapter.threshold), *adapter.settings]
    if adapter.kind == "dense" or all(threshold is not None for _, threshold in masks):
        return adapter
    if adapter.kind == "rank":
        score = calibrated.rank_scores(adapter.names, adapter.metric)[:, : adapter.rank].abs()
    else:
        norms = calibrated.joint_norms(adapter.names, adapter.metric)
        score = calibrated.sample(calibrated.input_of(adapter.names)).abs() * norms
    found = thresholds_for(score, [live for live, _ in masks])
    own, *settings = (
        Setting(live, threshold) if threshold is not None else Setting(kept, chosen)
        for (live, threshold), (chosen, kept) in zip(masks, found, strict=True)
    )
    return replace(adapter, threshold=own.threshold, live=own.live, settings=tuple(settings))


def block_tensors(calibrated: CalibratedBlock, adapters: list[AdapterSpec]) -> dict[str, Tensor]:
    """Return all tensors of the modules of `install.build_block`, except for the empty `weight` of each."""
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
    """Return a threshold of rank values for each rank, from the adapter's one threshold of scores."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    return adapter.threshold * calibrated.factors(adapter.names, adapter.metric).norms[: adapter.rank]


def _biases(calibrated: CalibratedBlock, owner: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    bias = calibrated.bias(names)
    return {} if bias is None else {f"{owner}.bias": bias.clone()}


def _rank_tensors(calibrated: CalibratedBlock, adapter: AdapterSpec) -> dict[str, Tensor]:
    owner, factors = adapter.names[0], calibrated.factors(adapter.names, adapter.metric)
    return {
        # These are clones, because a slice would hold the memory of the ranks that are not stored.
        f"{owner}.B": factors.B[: adapter.rank].clone(),
        f"{owner}.rows": factors.rows[: adapter.rank].clone(),
        f"{owner}.threshold": _rank_thresholds(calibrated, adapter),
        **_biases(calibrated, owner, adapter.names),
    }


def _neuron_tensors(calibrated: CalibratedBlock, adapter: AdapterSpec) -> dict[str, Tensor]:
    owner = adapter.names[0]
    return {
        f"{owner}.rows": calibrated.weight(adapter.names).T,
        **_neuron_mask(calibrated, owner, adapter),
        **_biases(calibrated, owner, adapter.names),
    }


def _neuron_mask(calibrated: CalibratedBlock, owner: str, adapter: AdapterSpec) -> dict[str, Tensor]:
    """Return the norms and thresholds of a neuron adapter, for the module `owner`."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    norms = calibrated.joint_norms(adapter.names, adapter.metric)
    return {f"{owner}.norms": norms, f"{owner}.threshold": torch.full_like(norms, adapter.threshold)}


def _mlp_tensors(calibrated: CalibratedBlock, adapters: list[AdapterSpec]) -> dict[str, Tensor]:
    """Return the tensors of a RanaMLP. B stacks the ranks of up over those of gate, or holds joint ranks.

    Joint neurons have no B.
    """
    block = calibrated.block
    by_name = {name: adapter for adapter in adapters for name in adapter.names}
    tensors = _neuron_tensors(calibrated, by_name[block.down])
    # The op wants the ranks of up first.
    stack = list(dict.fromkeys(by_name[name] for name in reversed(block.expanding)))
    if stack[0].kind == "neuron":
        tensors |= _neuron_mask(calibrated, block.mlp, stack[0])
    else:
        B = [calibrated.factors(a.names, a.metric).B[: a.rank] for a in stack]
        tensors[f"{block.mlp}.B"] = torch.cat(B)
        tensors[f"{block.mlp}.threshold"] = torch.cat([_rank_thresholds(calibrated, a) for a in stack])
    for name in block.expanding:
        adapter = by_name[name]
        place = adapter.names.index(name)
        tensors[f"{name}.rows"] = _rows_of(calibrated, adapter, place)
        bias = calibrated.bias(adapter.names)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.split(adapter.out_features)[place].clone()
    return tensors


def _rows_of(calibrated: CalibratedBlock, adapter: AdapterSpec, place: int) -> Tensor:
    """Return the rows of the linear at one place among those of an adapter."""
    if adapter.kind == "neuron":
        return calibrated.weight(adapter.names[place : place + 1]).T
    rows = calibrated.factors(adapter.names, adapter.metric).rows[: adapter.rank]
    return rows.split(adapter.out_features, dim=1)[place].clone()
