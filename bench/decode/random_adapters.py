"""Adapters for a model whose weights are random: sizes by a rule, thresholds by the scores of a few tokens.

Which rows are kept follows no pattern then, where a trained model keeps its leading ranks nearly always.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.models import stored_ranks
from bench.weights import threshold_keeping
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.model.install import install
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaLinear, RanaMLP

LIVE_SHARE = 0.5  # of the stored ranks that the masks keep
SAMPLE = 64  # tokens that the thresholds are set on


@torch.no_grad()
def adapt(dense: PreTrainedModel, keep: float, live_share: float) -> None:
    """Replace the linears of a Llama by random adapters that come to `keep` of their cost, in place.

    live_share   of the stored ranks; 1: plain low rank, down too, where otherwise it is masked by neurons
    """
    adapters = [a for block in find_blocks(dense) for a in _adapters(dense, block, keep, live_share)]
    install(dense, Plan(tuple(adapters), "random weights", 1 - keep))
    parts = [module for module in dense.modules() if isinstance(module, RanaLinear | RanaMLP)]
    for part in parts:
        randomize(part)
    if live_share < 1:
        neurons = next(round(a.live) for a in adapters if a.kind == "neuron")
        _set_thresholds(dense, parts, neurons)


def randomize(module: nn.Module) -> None:
    """Weights of a size that keeps values near 1."""
    for weight in module.parameters():
        nn.init.normal_(weight, std=max(weight.shape) ** -0.5)


def _adapters(dense: PreTrainedModel, block: Block, keep: float, live_share: float) -> Iterator[AdapterSpec]:
    """q, k and v jointly, gate, up and down; o stays dense, and the others make up for it."""
    weights = {name: linear_of(dense, name).weight for name in block.linears}
    whole, o = sum(w.numel() for w in weights.values()), weights[block.o].numel()
    keep = (keep * whole - o) / (whole - o)

    def adapter(kind: str, names: tuple[str, ...]) -> AdapterSpec:
        K, widths = weights[names[0]].shape[1], tuple(len(weights[name]) for name in names)
        N = sum(widths)
        rank = stored_ranks(K, N, keep, live_share)
        sizes = {"rank": (rank, live_share * rank), "neuron": (K, keep * K), "dense": (0, 0.0)}[kind]
        return AdapterSpec(kind, names, K, widths, *sizes)

    yield adapter("rank", block.qkv)
    yield adapter("rank", (block.gate,))
    yield adapter("rank", (block.up,))
    yield adapter("rank" if live_share == 1 else "neuron", (block.down,))
    yield adapter("dense", (block.o,))


def _set_thresholds(model: PreTrainedModel, parts: list[nn.Module], neurons: int) -> None:
    """Run a few random tokens; each adapter sets its thresholds by what it is given, and then computes."""

    def before(part: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if isinstance(part, RanaMLP):
            set_mlp_thresholds(part, x, neurons)
        else:
            part.set_threshold(halving(x @ part.B.float().T))

    hooks = [part.register_forward_pre_hook(before) for part in parts]
    model(torch.randint(model.config.vocab_size, (1, SAMPLE), device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()


def halving(h: Tensor) -> Tensor:
    """The threshold, [] float32, that leaves `LIVE_SHARE` of h [M, R]."""
    return threshold_keeping(round(LIVE_SHARE * h.shape[1]), h.abs())


def set_mlp_thresholds(mlp: RanaMLP, x: Tensor, neurons: int) -> None:
    """So that x [M, K], float32, keeps half of its ranks, and of what these leave `neurons` neurons."""
    up, gate = (x @ mlp.B.float().T).chunk(2, dim=1)
    thresholds = halving(up), halving(gate)
    mlp.set_threshold(torch.cat([t.expand(up.shape[1]) for t in thresholds]))
    up, gate = (torch.where(h.abs() < t, 0, h) for h, t in zip((up, gate), thresholds, strict=True))
    g = F.silu(gate @ mlp.gate_proj.rows.float()) * (up @ mlp.up_proj.rows.float())
    scale = mlp.down_proj.rows.float().norm(dim=1)
    mlp.down_proj.norms.copy_(scale)
    mlp.down_proj.set_threshold(threshold_keeping(neurons, (g * scale).abs()))
