"""The report of a compression, and the measurements in it."""

import json
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rana_kernels.checkpoint.manifest import versions
from rana_kernels.model.architectures import Block
from rana_kernels.model.head import output_head
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.ops import reference
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats
from rana_kernels.statistics.thresholds import evenly

SPECTRUM_POINTS = 64
ERROR_TOKENS = 256


@dataclass
class AdapterReport:
    """The sizes of one adapter, as in AdapterSpec, and its quality on the token sample.

    captured_energy   Σ score² over live rows, as a fraction of Σ score² over all rows
    output_error      ‖y - ŷ‖ / ‖y‖ on some tokens, without bias, before the weights are rounded
    spectrum          the energy of the ranks (or neurons) as fractions of their sum, falling: at most 64
                      points, evenly spaced in rank
    """

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
    """The result of a compression.

    plan                     the complete plan, with all thresholds
    block_flops_reduction    of one token in the linears of the blocks
    model_flops_reduction    of one token in these linears, experts and lm_head
    bytes_before, _after     of the whole model
    block_bytes_before, ...  of the linears of the blocks, or of their replacements
    read_bytes_before, ...   that one token reads in the linears of the blocks and lm_head
    block_time_reduction     expected from the measured times, if the compression had any
    """

    plan: Plan
    adapters: list[AdapterReport]
    block_flops_reduction: float
    model_flops_reduction: float
    bytes_before: int
    bytes_after: int
    block_bytes_before: int
    block_bytes_after: int
    read_bytes_before: int
    read_bytes_after: int
    seconds: float
    block_time_reduction: float | None = None

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "plan": json.loads(self.plan.to_json())}, indent=1)


def facts_of(model: nn.Module, stats: Stats, report: CompressReport) -> dict[str, Any]:
    """Return the JSON facts for the model card: how `model` was made."""
    return {
        "base_model": str(getattr(model.config, "name_or_path", "")),
        "calibration": {"tokens": stats.tokens, "seed": stats.seed, "sha256": stats.digest},
        "model_flops_reduction": report.model_flops_reduction,
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "block_bytes": {"before": report.block_bytes_before, "after": report.block_bytes_after},
        "read_bytes": {"before": report.read_bytes_before, "after": report.read_bytes_after},
        "block_time_reduction": report.block_time_reduction,
        "versions": versions(),
    }


def measure(calibrated: CalibratedBlock, adapter: AdapterSpec) -> AdapterReport:
    """Measure an adapter that has its threshold on the token sample, with the reference."""
    assert adapter.threshold is not None, "compress fills thresholds in first"
    name = calibrated.input_of(adapter.names)
    x, weight = calibrated.sample(name), calibrated.weight(adapter.names).float()
    if adapter.kind == "rank":
        scores = calibrated.rank_scores(adapter.names, adapter.metric)
        score, all_ranks = scores[:, : adapter.rank].abs(), scores.square().mean(0)
        h = calibrated.rank_values(adapter.names, adapter.metric)[:, : adapter.rank]
        rows = calibrated.factors(adapter.names, adapter.metric).rows[: adapter.rank].float()
    else:
        h, rows, score = x, weight.T, x.abs() * calibrated.joint_norms(adapter.names, adapter.metric)
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
    """Return the bytes of all parameters and buffers. Tied ones count once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def head_bytes(model: nn.Module) -> int:
    """Return the bytes of lm_head, 0 if the model has none."""
    head = output_head(model)
    return 0 if head is None else model_bytes(head)


def read_bytes(model: nn.Module, plan: Plan, itemsize: int) -> int:
    """Return the bytes that a token reads in the linears of the blocks and lm_head of a compressed model."""
    head = head_bytes(model) if plan.lm_head is None else plan.lm_head.read_bytes(itemsize)
    return round(plan.read_bytes(itemsize) + head)


def block_bytes(model: nn.Module, blocks: list[Block]) -> int:
    """Return the bytes that `max_memory` limits: the linears of the blocks, or their replacements."""
    total = 0
    for block in blocks:
        for name in filter(None, (*block.linears, block.mlp)):
            module = model.get_submodule(name)
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += sum(t.numel() * t.element_size() for t in own)
    return total


def model_flops_reduction(model: nn.Module, blocks: list[Block], plan: Plan) -> float:
    """Return the FLOPs reduction over the blocks' linears, lm_head and the experts that a token uses."""
    head, own = output_head(model), plan.lm_head
    experts = sum(_expert_flops(model, block.experts) for block in blocks if block.experts)
    dense = 2 * head.in_features * head.out_features if head is not None else 0
    kept = dense if own is None else own.flops
    return 1 - (plan.flops + kept + experts) / (plan.dense_flops + dense + experts)


def _expert_flops(model: nn.Module, name: str) -> float:
    experts, config = model.get_submodule(name), cast(Any, model.config)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return 2 * sum(p.numel() for p in experts.parameters()) * config.num_experts_per_tok / count
