"""What a compression did to a model: the report, and the measurements that go into it."""

import json
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rana_kernels.checkpoint.manifest import versions
from rana_kernels.model.architectures import Block
from rana_kernels.model.install import output_head
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.ops import reference
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.thresholds import evenly

SPECTRUM_POINTS = 64
ERROR_TOKENS = 256


@dataclass
class AdapterReport:
    """One adapter. `captured_energy`: kept share of Σ (|h|·norms)² on the sample. `output_error`:
    ‖y - ŷ‖ / ‖y‖ on some tokens of it, bias left out. `spectrum`: at most 64 points of the energy of
    its ranks (or neurons), falling, each as a share of their sum; they are evenly spaced in rank."""

    names: tuple[str, ...]
    kind: str
    rank: int
    live: float
    threshold: float
    cost_ratio: float
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


def facts_of(model: nn.Module, stats: Stats, report: CompressReport) -> dict[str, Any]:
    """Return what the model card will say of how `model` was made: JSON."""
    return {
        "base_model": str(getattr(model.config, "name_or_path", "")),
        "calibration": {"tokens": stats.tokens, "seed": stats.seed, "sha256": stats.digest},
        "model_flops_reduction": report.model_flops_reduction,
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "block_bytes": {"before": report.block_bytes_before, "after": report.block_bytes_after},
        "block_time_reduction": report.block_time_reduction,
        "versions": versions(),
    }


def measure(calibrated: CalibratedBlock, adapter: AdapterSpec) -> AdapterReport:
    """Apply an adapter that has its threshold to the sample, through the reference."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    name = calibrated.input_of(adapter.names)
    x, weight = calibrated.sample(name), calibrated.weight(adapter.names).float()
    if adapter.kind == "rank":
        scores = calibrated.rank_scores(adapter.names, adapter.metric)
        score, all_ranks = scores[:, : adapter.rank].abs(), scores.square().mean(0)
        h = calibrated.rank_values(adapter.names, adapter.metric)[:, : adapter.rank]
        rows = calibrated.factors(adapter.names, adapter.metric).rows[: adapter.rank].float()
    else:
        h, rows, score = x, weight.T, x.abs() * calibrated.neuron_norms(adapter.names[0], adapter.metric)
        all_ranks = score.square().mean(0).sort(descending=True).values
    mask = reference.keep(score, torch.tensor(adapter.threshold, dtype=torch.float32, device=h.device))
    some = evenly(len(x), ERROR_TOKENS)
    exact = x[some] @ weight.T
    error = exact - torch.where(mask[some], h[some], 0) @ rows
    return AdapterReport(
        names=adapter.names,
        kind=adapter.kind,
        rank=adapter.rank,
        live=adapter.live,
        threshold=adapter.threshold,
        cost_ratio=adapter.cost_ratio,
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


def block_bytes(model: nn.Module, blocks: list[Block]) -> int:
    """Bytes of the linears of the blocks, or of what is in their place: what `max_memory` is about."""
    total = 0
    for block in blocks:
        for name in filter(None, (*block.linears, block.mlp)):
            module = model.get_submodule(name)
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += sum(t.numel() * t.element_size() for t in own)
    return total


def model_flops_reduction(model: nn.Module, blocks: list[Block], plan: Plan) -> float:
    """The reduction with lm_head in the account, where the model has one, and the experts that a token
    goes through."""
    head = output_head(model)
    flops = 2 * head.weight.numel() if head is not None else 0
    flops += sum(_expert_flops(model, block.experts) for block in blocks if block.experts)
    return 1 - (plan.flops + flops) / (plan.dense_flops + flops)


def _expert_flops(model: nn.Module, name: str) -> float:
    experts, config = model.get_submodule(name), cast(Any, model.config)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return 2 * sum(p.numel() for p in experts.parameters()) * config.num_experts_per_tok / count
