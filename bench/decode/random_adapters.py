"""Adapters for a model with random weights: sizes by a rule, thresholds by the scores of a few tokens.

Kept rows then follow no pattern, while a trained model keeps its leading ranks nearly always.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.kernels.cases import stored_ranks
from bench.kernels.weights import threshold_for_live
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.model.install import install
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaLinear
from rana_kernels.nn.mlp import RanaMLP

LIVE_SHARE = 0.5  # of the stored ranks
SAMPLE = 64  # tokens that set the thresholds


@torch.no_grad()
def adapt(dense: PreTrainedModel, cost_ratio: float, live_share: float) -> None:
    """Replace the linears of a Llama by random adapters that cost `cost_ratio` together, in place.

    live_share   of the stored ranks. With 1 every linear is plain low rank; otherwise down has a neuron
                 adapter
    """
    adapters = [a for block in find_blocks(dense) for a in _adapters(dense, block, cost_ratio, live_share)]
    install(dense, Plan(tuple(adapters), "random weights", 1 - cost_ratio))
    parts = [module for module in dense.modules() if isinstance(module, RanaLinear | RanaMLP)]
    for part in parts:
        randomize(part)
    if live_share < 1:
        neurons = next(round(a.live) for a in adapters if a.kind == "neuron")
        _set_thresholds(dense, parts, neurons)


def randomize(module: nn.Module) -> None:
    """Draw weights of a size that leaves values near 1."""
    for weight in module.parameters():
        nn.init.normal_(weight, std=max(weight.shape) ** -0.5)


def _adapters(
    dense: PreTrainedModel, block: Block, cost_ratio: float, live_share: float
) -> Iterator[AdapterSpec]:
    """Yield joint q, k and v, then gate, up and down. o stays dense, and the others make up for it."""
    weights = {name: linear_of(dense, name).weight for name in block.linears}
    whole, o = sum(w.numel() for w in weights.values()), weights[block.o].numel()
    cost_ratio = (cost_ratio * whole - o) / (whole - o)

    def adapter(kind: str, names: tuple[str, ...]) -> AdapterSpec:
        K, widths = weights[names[0]].shape[1], tuple(len(weights[name]) for name in names)
        N = sum(widths)
        rank = stored_ranks(K, N, cost_ratio, live_share)
        sizes = {"rank": (rank, live_share * rank), "neuron": (K, cost_ratio * K), "dense": (0, 0.0)}[kind]
        return AdapterSpec(kind, names, K, widths, *sizes)

    yield adapter("rank", block.qkv)
    yield adapter("rank", (block.gate,))
    yield adapter("rank", (block.up,))
    yield adapter("rank" if live_share == 1 else "neuron", (block.down,))
    yield adapter("dense", (block.o,))


def _set_thresholds(model: PreTrainedModel, parts: list[nn.Module], neurons: int) -> None:
    """Run a few random tokens. Each adapter sets its thresholds by its input, and then computes."""

    def before(part: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if isinstance(part, RanaMLP):
            set_mlp_thresholds(part, x, neurons)
        else:
            part.set_threshold(halving_threshold(x @ part.B.float().T))

    hooks = [part.register_forward_pre_hook(before) for part in parts]
    model(torch.randint(model.config.vocab_size, (1, SAMPLE), device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()


def halving_threshold(h: Tensor) -> Tensor:
    """Return the threshold, [] float32, that `LIVE_SHARE` of the values h [M, R] reach."""
    return threshold_for_live(round(LIVE_SHARE * h.shape[1]), h.abs())


def set_mlp_thresholds(mlp: RanaMLP, x: Tensor, neurons: int) -> None:
    """Set thresholds so that x [M, K], float32, keeps half of the ranks, and `neurons` neurons after them."""
    up, gate = (x @ mlp.B.float().T).chunk(2, dim=1)
    thresholds = halving_threshold(up), halving_threshold(gate)
    mlp.set_threshold(torch.cat([t.expand(up.shape[1]) for t in thresholds]))
    up, gate = (torch.where(h.abs() < t, 0, h) for h, t in zip((up, gate), thresholds, strict=True))
    g = F.silu(gate @ mlp.gate_proj.rows.float()) * (up @ mlp.up_proj.rows.float())
    norms = mlp.down_proj.rows.float().norm(dim=1)
    mlp.down_proj.norms.copy_(norms)
    mlp.down_proj.set_threshold(threshold_for_live(neurons, (g * norms).abs()))
