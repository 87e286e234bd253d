"""Everything the demo finds out, as plain data: `report.json` is this, and the page is drawn from it.

`keep` is a cost as a fraction of the dense cost, over the linears of the transformer blocks (o is
among them and stays dense). Times are microseconds.
"""

from dataclasses import dataclass, field

from examples.demo.provenance import Provenance


@dataclass
class Adapted:
    """One adapter: `linear` is qkv, gate, up or down. `planned` and `live` are mean kept rows a token,
    on the calibration sample and on evaluation text, of `rank` stored ones."""

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
    """The model compressed once. `keep` is counted with the rows kept on evaluation text, `over_dense`
    is the fraction by which the perplexity exceeds that of the dense model."""

    method: str
    flops_reduction: float
    planned_keep: float
    keep: float
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
class Text:
    """What one model wrote after `prompt`. `same_as_dense`: leading tokens equal to the dense model's."""

    label: str
    continuation: str
    tokens: int
    same_as_dense: int


@dataclass
class Texts:
    """`flops_reduction` is that of the compressed models; RaNA's was written to disk and read back."""

    prompt: str
    flops_reduction: float
    stored_megabytes: float
    texts: list[Text]


@dataclass
class Timing:
    """Median and 20th and 80th percentile of the runs; `gbs` is the bytes that must be read ÷ median."""

    median: float
    p20: float
    p80: float
    gbs: float


@dataclass
class DecodeStep:
    """The linears of one block, one token. `speedup` = dense time ÷ RaNA time."""

    block: str
    threads: int
    keep: float
    dense: Timing
    rana: Timing
    speedup: float


@dataclass
class DensityPoint:
    density: float
    keep: float
    rana: Timing


@dataclass
class DensitySweep:
    """One masked low-rank linear at several live fractions of its `rank` stored rows."""

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
    texts: Texts
    decode_steps: list[DecodeStep]
    density: list[DensitySweep]
    seconds: float = 0.0
