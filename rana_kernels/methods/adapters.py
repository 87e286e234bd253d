"""Adapters of a plan, with their sizes taken from the linears that they are for."""

from rana_kernels.layer import Layer
from rana_kernels.plan import Adapter


def dense_adapter(layer: Layer, name: str) -> Adapter:
    return make_adapter(layer, "dense", (name,), 0, 0.0, None)


def make_adapter(
    layer: Layer,
    kind: str,
    names: tuple[str, ...],
    rank: int,
    live: float,
    threshold: float | None,
    metric: str = "output",
) -> Adapter:
    """An adapter with the sizes of the layer's linears `names`."""
    linears = [layer.linear(name) for name in names]
    return Adapter(
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
