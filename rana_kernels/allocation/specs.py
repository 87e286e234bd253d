"""Construction of AdapterSpecs with the sizes of the linears that they cover."""

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.statistics.block import CalibratedBlock


def dense_spec(calibrated: CalibratedBlock, name: str) -> AdapterSpec:
    """Return the AdapterSpec of a linear that stays dense."""
    return make_spec(calibrated, "dense", (name,), 0, 0.0, None)


def make_spec(
    calibrated: CalibratedBlock,
    kind: str,
    names: tuple[str, ...],
    rank: int,
    live: float,
    threshold: float | None,
    metric: str = "output",
) -> AdapterSpec:
    """Return an AdapterSpec with the sizes of the linears `names` of the block."""
    linears = [calibrated.linear(name) for name in names]
    return AdapterSpec(
        kind=kind,
        names=names,
        in_features=linears[0].in_features,
        out_features=tuple(linear.out_features for linear in linears),
        rank=rank,
        live=live,
        threshold=threshold,
        bias=any(linear.bias is not None for linear in linears),
        metric=metric,
    )
