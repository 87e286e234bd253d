"""The results of the demo as plain data. `report.json` holds them, and the page is drawn from them.

`cost_ratio` is a cost as a fraction of the dense cost, over the linears of the transformer blocks, of which o
stays dense. Times are in microseconds.
"""

import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version

import torch

import rana_kernels
from bench.report.results import revision
from rana_kernels import backends
from rana_kernels.system.cpu import processor_name


@dataclass(frozen=True)
class Provenance:
    """The machine, versions and revision, without which numbers cannot be compared."""

    date: str
    processor: str
    cores: int
    instruction_set: str
    served_by: str
    python: str
    torch: str
    transformers: str
    rana_kernels: str
    revision: str

    def line(self) -> str:
        """Return one line for captions."""
        kernels = f"{self.served_by} kernels" + (
            f" ({self.instruction_set})" if self.served_by == "cpu" else ""
        )
        return (
            f"{self.processor}, {self.cores} cores · {kernels} · torch {self.torch} · "
            f"rana_kernels {self.rana_kernels}, revision {self.revision} · {self.date}"
        )


def provenance() -> Provenance:
    return Provenance(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        instruction_set=backends.instruction_set(),
        served_by=backends.serving()["masked_mlp"]["cpu"],
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        rana_kernels=rana_kernels.__version__,
        revision=revision(),
    )


@dataclass
class Adapted:
    """One adapter. `linear` is qkv, gate, up or down.

    `planned` and `live` are mean live rows a token, on the calibration sample and on evaluation text.
    """

    layer: int
    linear: str
    kind: str
    rank: int
    planned: float
    live: float
    output_error: float
    spectrum: list[float]


@dataclass
class Variant:
    """One compressed model. `cost_ratio` is measured on evaluation text.

    `over_dense` is the fraction by which the perplexity exceeds that of the dense model.
    """

    method: str
    flops_reduction: float
    planned_cost_ratio: float
    cost_ratio: float
    perplexity: float
    over_dense: float
    megabytes: float
    seconds: float
    adapters: list[Adapted]


@dataclass
class Quality:
    parameters: int
    calibration_tokens: int
    evaluation_tokens: int
    perplexity: float
    megabytes: float
    variants: list[Variant] = field(default_factory=list)


@dataclass
class InBits:
    """A model with weights of so many bits. Megabytes are of the linears and lm_head.

    `method` is "dense" or a method. One token reads `read_megabytes`. Speed is that of one text.
    """

    method: str
    bits: int
    perplexity: float
    over_dense: float
    megabytes: float
    read_megabytes: float
    tokens_per_second: float


@dataclass
class Text:
    """The continuation by one model. `same_as_dense`: leading tokens equal to the dense model's."""

    label: str
    continuation: str
    tokens: int
    same_as_dense: int


@dataclass
class Texts:
    """The continuations of `prompt`. `flops_reduction` is that of the compressed models."""

    prompt: str
    flops_reduction: float
    stored_megabytes: float
    texts: list[Text]


@dataclass
class Timing:
    """Median, and 20th and 80th percentile, of the runs. `gbs` is the bytes that must be read ÷ median."""

    median: float
    p20: float
    p80: float
    gbs: float


@dataclass
class DecodeStep:
    """The linears of one block, one token. `speedup` = dense time ÷ RaNA time."""

    block: str
    threads: int
    cost_ratio: float
    dense: Timing
    rana: Timing
    speedup: float


@dataclass
class DensityPoint:
    density: float
    cost_ratio: float
    rana: Timing


@dataclass
class DensitySweep:
    """One masked low-rank linear at several live shares of its `rank` stored rows."""

    in_features: int
    out_features: int
    rank: int
    threads: int
    dense: Timing
    points: list[DensityPoint]


@dataclass
class Results:
    provenance: Provenance
    quality: Quality
    bits: list[InBits]
    texts: Texts
    decode_steps: list[DecodeStep]
    density: list[DensitySweep]
    seconds: float = 0.0
