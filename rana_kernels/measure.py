"""What a compression did to a model: the report, and the measurements that go into it."""

import json
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rana_kernels.backends import reference
from rana_kernels.layer import Layer
from rana_kernels.models import find_blocks
from rana_kernels.plan import Adapter, Plan

SPECTRUM_POINTS = 64
ERROR_TOKENS = 256


@dataclass
class AdapterReport:
    """One adapter. `captured_energy`: kept share of Σ (|h|·scale)² on the sample. `output_error`:
    ‖y - ŷ‖ / ‖y‖ on some tokens of it, bias left out. `spectrum`: at most 64 points of the energy of
    its ranks (or neurons), falling, each as a share of their sum; they are evenly spaced in rank."""

    names: tuple[str, ...]
    kind: str
    rank: int
    live: float
    threshold: float
    keep: float
    captured_energy: float
    output_error: float
    spectrum: list[float]


@dataclass
class CompressReport:
    """`plan` is complete (every threshold filled in). FLOPs are a token's; bytes are the model's, those that
    `block_bytes` counts apart. `block_time_reduction`: expected, by the times that the plan was made with."""

    plan: Plan
    adapters: list[AdapterReport]
    block_flops_reduction: float
    model_flops_reduction: float  # blocks and lm_head
    bytes_before: int
    bytes_after: int
    block_bytes_before: int
    block_bytes_after: int
    seconds: float
    block_time_reduction: float | None = None

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "plan": json.loads(self.plan.to_json())}, indent=1)


def measure(layer: Layer, adapter: Adapter) -> AdapterReport:
    """Apply an adapter that has its threshold to the sample, through the reference."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    name = layer.input_of(adapter.names)
    x, weight = layer.sample(name), layer.weight(adapter.names).float()
    if adapter.kind == "rank":
        scores = layer.rank_scores(adapter.names, adapter.metric)
        score, all_ranks = scores[:, : adapter.rank].abs(), scores.square().mean(0)
        h = layer.rank_values(adapter.names, adapter.metric)[:, : adapter.rank]
        rows = layer.factors(adapter.names, adapter.metric).rows[: adapter.rank].float()
    else:
        h, rows, score = x, weight.T, x.abs() * layer.scale(adapter.names[0], adapter.metric)
        all_ranks = score.square().mean(0).sort(descending=True).values
    mask = reference.keep(score, torch.tensor(adapter.threshold, dtype=torch.float32, device=h.device))
    some = slice(None, None, -(-len(x) // ERROR_TOKENS))
    exact = x[some] @ weight.T
    error = exact - torch.where(mask[some], h[some], 0) @ rows
    return AdapterReport(
        names=adapter.names,
        kind=adapter.kind,
        rank=adapter.rank,
        live=adapter.live,
        threshold=adapter.threshold,
        keep=adapter.keep,
        captured_energy=_ratio(torch.where(mask, score, 0).square().mean(0).sum(), all_ranks.sum()),
        output_error=_ratio(error.norm(), exact.norm()),
        spectrum=_downsample(all_ranks / all_ranks.sum().clamp_min(1e-30)),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _downsample(spectrum: Tensor) -> list[float]:
    points = torch.linspace(0, len(spectrum) - 1, min(SPECTRUM_POINTS, len(spectrum))).round().long()
    return spectrum[points.to(spectrum.device)].tolist()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def block_bytes(model: nn.Module) -> int:
    """Bytes of the linears of the blocks, or of what is in their place: what `max_memory` is about."""
    total = 0
    for block in find_blocks(model):
        for name in filter(None, (*block.linears, block.mlp)):
            module = model.get_submodule(name)
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += sum(t.numel() * t.element_size() for t in own)
    return total


def model_flops_reduction(model: nn.Module, plan: Plan) -> float:
    """The reduction with lm_head in the account, where the model has one, and the experts that a token
    goes through."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    flops = 2 * head.weight.numel() if head is not None else 0
    flops += sum(_expert_flops(model, block.experts) for block in find_blocks(model) if block.experts)
    return 1 - (plan.flops + flops) / (plan.dense_flops + flops)


def _expert_flops(model: nn.Module, name: str) -> float:
    experts, config = model.get_submodule(name), cast(Any, model.config)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return 2 * sum(p.numel() for p in experts.parameters()) * config.num_experts_per_tok / count
