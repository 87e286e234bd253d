"""Thresholds for weights that have changed: every adapter keeps its planned live rows again."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.architectures import decoder_name
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.factored import Factored, factored
from rana_kernels.statistics.thresholds import threshold_for


@torch.no_grad()
def refit(model: nn.Module, rows: Tensor) -> None:
    """Fit the thresholds of a compressed model in factored form (`factored.py`) on `rows` [n, T], in place.

    The thresholds of an adapter are all multiplied by one number, so that what its ranks (or neurons) weigh
    against each other stays. One pass: a module is fitted before it runs, on what the fitted ones before
    it give. Rows whose threshold is 0 stay on. The model's plan then says what was found.
    """
    plan = attached_plan(model)
    assert plan is not None, "only compressed models have thresholds"
    found: dict[str, AdapterSpec] = {}
    with _fitting(model, {a.names[0]: a for a in plan.adapters}, found):
        decoder: Any = model.get_submodule(decoder_name(model))
        decoder(rows.to(next(model.parameters()).device), use_cache=False)
    adapters = tuple(found.get(adapter.names[0], adapter) for adapter in plan.adapters)
    attach_plan(model, plan.with_adapters(adapters), attached_facts(model))


@contextmanager
def _fitting(model: nn.Module, planned: dict[str, AdapterSpec], found: dict[str, AdapterSpec]):
    def hook(name: str, module: Factored):
        def fit(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = _fit(module, planned[name], args[0])

        return fit

    hooks = [module.register_forward_pre_hook(hook(name, module)) for name, module in factored(model)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _fit(module: Factored, adapter: AdapterSpec, x: Tensor) -> AdapterSpec:
    assert adapter.threshold is not None, "compress has filled thresholds in"
    masked = module.threshold > 0
    if not masked.any():
        return adapter
    always = int((~masked).sum())
    ratios = module.scores(x.flatten(0, -2))[:, masked] / module.threshold[masked]
    factor, kept = threshold_for(ratios, max(0.0, adapter.live - always))
    module.threshold *= factor
    return replace(adapter, threshold=adapter.threshold * factor, live=kept + always)
