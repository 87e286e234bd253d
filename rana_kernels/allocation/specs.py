"""Adapters of a plan, with their sizes taken from the linears that they are for."""

from rana_kernels.model.plan import AdapterSpec
from rana_kernels.statistics.block import CalibratedBlock


def dense_spec(calibrated: CalibratedBlock, name: str) -> AdapterSpec:
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
    """An adapter with the sizes of the layer's linears `names`."""
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
