"""The choice of how many rows of every neuron adapter are live at each budget of the dial (`model/dial.py`).

The budgets share the weights of one plan, and so its kinds, formats and joint masks. With those fixed, each
budget is spent over the linears as the planned one was (`spending.py`), in FLOPs.
"""

from dataclasses import replace

from rana_kernels.allocation.spending import Choice, Curve, Ways, spend
from rana_kernels.model.plan import AdapterSpec, Plan, Setting
from rana_kernels.nn.format import Format

RATIOS = (0.45, 0.56, 0.7, 0.8, 0.9)  # of the dense FLOPs of the blocks' linears
SAME = 0.01  # a ratio so close to the planned one adds nothing

Offers = dict[tuple[tuple[str, ...], Format], Curve]


def with_dial(plan: Plan, curves: list[Ways], masks_dense: bool) -> Plan:
    """Return the plan with settings: for its own ratio, those of RATIOS in reach, and without masks.

    curves        those of the blocks that the plan was chosen from
    masks_dense   whether a linear that the plan leaves dense gets a neuron adapter with all inputs live, if a
                  lower budget masks it. It then stores norms and thresholds
    """
    offers = _offers(curves)
    sharing = [_sharing(adapter, offers, masks_dense) for adapter in plan.adapters]
    planned = 1 - plan.reduction
    lives = {planned: [a.in_features if a.kind == "dense" else a.live for a in plan.adapters]}
    for ratio in RATIOS:
        chosen = spend([[[curve]] for curve in sharing], ratio * plan.dense_flops)
        if chosen is not None and abs(ratio - planned) >= SAME:
            lives[ratio] = [choice.adapter.live for choice in chosen]
    unmasked = tuple(curve[0].adapter.live for curve in sharing)
    # ratios above what the ranks of a plan cost have no masks either
    rising = list(dict.fromkeys([*(tuple(lives[ratio]) for ratio in sorted(lives)), unmasked]))
    adapters = tuple(
        _with_settings(adapter, curve[0].adapter, own)
        for adapter, curve, own in zip(plan.adapters, sharing, zip(*rising, strict=True), strict=True)
    )
    has_dial = any(adapter.settings for adapter in adapters)
    return replace(plan, adapters=adapters, lm_head=_of_head(plan.lm_head, len(rising) if has_dial else 0))


def _offers(curves: list[Ways]) -> Offers:
    """Return the choices without ranks by the names of their linears and their format."""
    found: Offers = {}
    for choice in (choice for ways in curves for way in ways for curve in way for choice in curve):
        if choice.adapter.kind != "rank":
            found.setdefault((choice.adapter.names, choice.adapter.format), []).append(choice)
    return found


def _sharing(adapter: AdapterSpec, offers: Offers, masks_dense: bool) -> Curve:
    """Return the choices with the weights of an adapter: first all inputs live, then the masks of neurons.

    Their costs are FLOPs. Ranks have one choice, and so have dense linears unless `masks_dense`.
    """
    if adapter.kind == "rank" or (adapter.kind == "dense" and not masks_dense):
        return [Choice(adapter.flops, 0, 0.0, adapter)]
    alone = (choice for name in adapter.names for choice in offers[(name,), adapter.format])
    rounding = sum(choice.error for choice in alone if choice.adapter.kind == "dense")
    masks = [c for c in offers[adapter.names, adapter.format] if c.adapter.kind == "neuron"]
    full = replace(masks[0].adapter, live=adapter.in_features) if masks else adapter
    whole = Choice(adapter.dense_flops, 0, rounding, full)
    return [whole, *(Choice(c.adapter.flops, 0, c.error, c.adapter) for c in masks)]


def _with_settings(adapter: AdapterSpec, full: AdapterSpec, lives: tuple[float, ...]) -> AdapterSpec:
    """Return the adapter with a setting for each of `lives`. One that no budget masks stays dense.

    full   its choice with all inputs live
    """
    unmasked = adapter.kind == "dense" and all(live == adapter.in_features for live in lives)
    if full.kind != "neuron" or unmasked:
        return adapter
    own = adapter if adapter.kind == "neuron" else full
    return replace(own, settings=tuple(map(Setting, lives)))


def _of_head(head: AdapterSpec | None, count: int) -> AdapterSpec | None:
    """Return lm_head with `count` settings. It keeps its mask, except at the last one, where all is live."""
    if head is None or head.kind != "neuron" or count == 0:
        return head
    lives = [head.live] * (count - 1) + [head.in_features]
    return replace(head, settings=tuple(map(Setting, lives)))
