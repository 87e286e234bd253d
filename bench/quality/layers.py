"""The share of its output's energy that each layer keeps, on the dense model's inputs.

The share is 1 - ‖y - ŷ‖² / ‖y‖² over the tokens. It is 1 without an error, and 0 for an output of zeros.
"""

import torch
from torch import Tensor, nn

from bench.quality.subject import BATCH, Subject


@torch.inference_mode()
def kept_energy(subject: Subject, model: nn.Module, token_ids: Tensor) -> dict[str, list[float]]:
    """Return {"qkv", "mlp": one share a layer}. Blocks whose MLP is no module of its own have no "mlp"."""
    found: dict[str, list[float]] = {}
    for part, groups in _parts(subject).items():
        inputs = _inputs(subject.dense, [names[0] for names in groups], token_ids)
        found[part] = [
            _share(subject.dense, model, names, x) for names, x in zip(groups, inputs, strict=True)
        ]
    return found


def _parts(subject: Subject) -> dict[str, list[tuple[str, ...]]]:
    """Return the modules that read one input, block by block, in the order of their calls."""
    parts = {
        "qkv": [block.qkv for block in subject.blocks if block.qkv],
        "mlp": [(block.mlp,) for block in subject.blocks if block.mlp],
    }
    return {part: groups for part, groups in parts.items() if groups}


def _inputs(dense: nn.Module, names: list[str], token_ids: Tensor) -> list[Tensor]:
    """Return the input of each of `names` in the dense model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0])
        )
        for name in names
    ]
    try:
        for part in token_ids.split(BATCH):
            dense(input_ids=part.to(dense.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(seen[name]) for name in names]


def _share(dense: nn.Module, model: nn.Module, names: tuple[str, ...], x: Tensor) -> float:
    lost = whole = 0.0
    for name in names:
        y = dense.get_submodule(name)(x).double()
        lost += float((y - model.get_submodule(name)(x).double()).square().sum())
        whole += float(y.square().sum())
    return 1 - lost / whole
