"""The contenders at equal bytes: weights rounded to few bits, alone and under masks.

A budget is a fraction of the bytes that a token reads in 16 bits in the linears of the blocks and in lm_head.
The bytes of scales, norms and thresholds count. All weights are rounded by the same method, GPTQ under the
moments of the calibration with groups of 32, lm_head as well. TEAL and WINA mask the linears of the blocks.
Ours also chooses what lm_head reads.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

from torch import nn

import rana_kernels as rana
from bench.quality.masks import put_masks
from bench.quality.subject import Candidate, Subject, rotated_subject
from rana_kernels.allocation import request as requests
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.spending import Ways
from rana_kernels.allocation.whole_model import head_curves, model_curves, plan_curves
from rana_kernels.evaluation.density import Costs
from rana_kernels.model.plan import Plan
from rana_kernels.ops.quantized import dequantize, groups_of
from rana_kernels.quantization.moments import Moments
from rana_kernels.quantization.rounding import quantize
from rana_kernels.statistics.block import CalibratedBlock

BYTES = "bytes"  # the name of the scope
GROUP = 32
WIDTHS = (8, 4, 3)
FLOAT_BITS, SCALE_BITS = 16, 16


def rounded(subject: Subject, scope: str, share: float) -> Candidate:
    """Return the dense model in the width whose bytes are next to the budget."""
    bits = min(WIDTHS, key=lambda width: abs(_bits(subject, width) - share * _bits(subject, FLOAT_BITS)))
    costs = Costs(_bits(subject, FLOAT_BITS), _bits(subject, bits), {})
    return Candidate(copy.deepcopy(_rounded(subject, bits)), costs, subject.dense)


def masked(subject: Subject, scope: str, share: float, *, bits: int, weighted: bool) -> Candidate:
    """Return TEAL, or `weighted` WINA, over rounded weights. Raise ValueError for a budget out of reach."""
    everything, head = _bits(subject, bits), _weight_bits(subject, subject.stats.head.head, bits)
    live = (share * _bits(subject, FLOAT_BITS) - head) / (everything - head)
    if not 0 < live <= 1:
        raise ValueError(f"in {bits} bits it reads at most {everything / _bits(subject, FLOAT_BITS):.3f}")
    model = copy.deepcopy(_rounded(subject, bits))
    names = [name for block in subject.blocks for name in block.linears]
    put_masks(model, subject, dict.fromkeys(names, live), weighted)
    row = {
        name: round(_weight_bits(subject, name, bits) / subject.dense.get_submodule(name).in_features)
        for name in names
    }
    return Candidate(model, Costs(_bits(subject, FLOAT_BITS), head, row), subject.dense)


def ours(subject: Subject, scope: str, share: float, *, bits: int | str) -> Candidate:
    """Compress by `global` under a budget of bytes, in one width or in several."""
    itemsize = subject.dense.get_input_embeddings().weight.element_size()
    reduction = 1 - share * FLOAT_BITS / (8 * itemsize)
    plan = plan_curves(subject.stats, _curves(subject, bits), _request(subject, bits, reduction))
    model, stats = subject.copy()
    report = rana.compress(model, plan=plan, stats=stats, progress=False)
    return Candidate(model, _costs(subject, report.plan), subject.dense, report)


def rotated(subject: Subject, scope: str, share: float, *, bits: int) -> Candidate:
    """Compress as `ours`, after a rotation of the dense model."""
    return ours(rotated_subject(subject), scope, share, bits=bits)


CONTENDERS: dict[str, Callable[[Subject, str, float], Candidate]] = {
    "rounded": rounded,
    "teal-8": partial(masked, bits=8, weighted=False),
    "teal-4": partial(masked, bits=4, weighted=False),
    "wina-4": partial(masked, bits=4, weighted=True),
    "global-8": partial(ours, bits=8),
    "global-4": partial(ours, bits=4),
    "global-auto": partial(ours, bits="auto"),
    "rotated-8": partial(rotated, bits=8),
}


@lru_cache(maxsize=len(WIDTHS))
def _rounded(subject: Subject, bits: int) -> nn.Module:
    """Return a copy of the dense model with all weights rounded."""
    model, _ = subject.copy()
    for block in (*subject.blocks, subject.stats.head):
        calibrated = CalibratedBlock(subject.dense, block, subject.stats)
        moments = Moments(calibrated)
        for name in block.linears:
            weight = calibrated.linear(name).weight.detach()
            q, scale = quantize(weight, bits, GROUP, moments.of_input((name,)))
            module = model.get_submodule(name)
            # an embedding that is tied to lm_head keeps its values
            module.weight = nn.Parameter(dequantize(q, scale, weight.shape[1]).to(weight.dtype))
    return model


@lru_cache(maxsize=4)
def _curves(subject: Subject, bits: int | str) -> list[Ways]:
    """Return the curves of all linears, which serve every budget of bytes."""
    asked = _request(subject, bits, 0.5)
    return model_curves(subject.stats, asked.pricing, progress=False) + head_curves(
        subject.stats, subject.stats.head, asked
    )


def _request(subject: Subject, bits: int | str, reduction: float) -> Request:
    own, head = requests.formats(subject.dense, bits, GROUP, None)
    return Request("global", bytes_reduction=reduction, formats=own, lm_head_formats=head)


def _costs(subject: Subject, plan: Plan) -> Costs:
    """Return the bits that a token reads, with floats of 16 bits."""
    fixed, row = 0.0, {}
    for adapter in plan.all_adapters:
        without = replace(adapter, live=0.0).read_bytes(FLOAT_BITS // 8)
        fixed += 8 * without
        if adapter.kind != "dense":
            row[adapter.names[0]] = round(
                8 * (replace(adapter, live=1.0).read_bytes(FLOAT_BITS // 8) - without)
            )
    if plan.lm_head is None:
        fixed += _weight_bits(subject, subject.stats.head.head, FLOAT_BITS)
    return Costs(_bits(subject, FLOAT_BITS), fixed, row)


def _bits(subject: Subject, bits: int) -> int:
    """Return the bits of all weights in one width."""
    names = [name for block in (*subject.blocks, subject.stats.head) for name in block.linears]
    return sum(_weight_bits(subject, name, bits) for name in names)


def _weight_bits(subject: Subject, name: str, bits: int) -> int:
    N, K = subject.dense.get_submodule(name).weight.shape
    return N * K * bits + (bits < FLOAT_BITS) * SCALE_BITS * N * groups_of(K, GROUP)
