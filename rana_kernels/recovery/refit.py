"""New thresholds after the weights have changed, so that every adapter keeps its planned live rows again.

Weights that are to be quantised are rounded in the same pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.architectures import decoder_name
from rana_kernels.model.hooks import of_this_thread
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.factored import Factored, FactoredLinear, factored
from rana_kernels.recovery.rounding import Rounding, outputs
from rana_kernels.statistics.thresholds import threshold_for
from rana_kernels.system.progress import meter


@torch.no_grad()
def refit(
    model: nn.Module, token_ids: Tensor, rounding: Rounding | None = None, progress: bool = True
) -> None:
    """Fit the thresholds of a compressed model in factored form (`nn/factored.py`) on `token_ids` [n, T].

    rounding   gets the weights that the plan quantises, rounded. The model has their values as floats

    All thresholds of an adapter are multiplied by one number, so the ranks (or neurons) keep their relative
    weights. One pass is enough: each module is fitted before it runs, on the outputs of the modules that were
    fitted before it. Rows whose threshold is 0 stay on. The new thresholds are stored in the model's plan.
    """
    plan = attached_plan(model)
    assert plan is not None, "only compressed models have thresholds"
    found: dict[str, AdapterSpec] = {}
    planned = {adapter.names[0]: adapter for adapter in plan.adapters}
    with (
        meter("fitting thresholds", len(planned), progress) as advance,
        _fitting(model, planned, found, rounding, advance),
    ):
        decoder: Any = model.get_submodule(decoder_name(model))
        decoder(token_ids.to(next(model.parameters()).device), use_cache=False)
    adapters = tuple(found.get(adapter.names[0], adapter) for adapter in plan.adapters)
    attach_plan(model, plan.with_adapters(adapters), attached_facts(model))


@contextmanager
def _fitting(
    model: nn.Module,
    planned: dict[str, AdapterSpec],
    found: dict[str, AdapterSpec],
    rounding: Rounding | None,
    advance: Callable[[], None],
) -> Iterator[None]:
    """Hold hooks that fit each module before it runs and add its new AdapterSpec to `found`."""

    def hook(name: str, module: Any):
        def fit(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, spec = args[0].flatten(0, -2), planned[name]
            own = rounding if spec.format.quantized else None
            if spec.kind != "dense":
                found[name] = _fit(module, spec, x) if own is None else _fit_rounded(module, spec, x, own)
            elif own is not None:
                own.round_dense(module, spec, x.float())
            advance()

        return fit

    modules: list[tuple[str, Any]] = [(name, module) for name, module in factored(model) if name in planned]
    modules += [(name, model.get_submodule(name)) for name, spec in planned.items() if spec.kind == "dense"]
    hooks = [module.register_forward_pre_hook(of_this_thread(hook(name, module))) for name, module in modules]
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
    ratios = module.scores(x)[:, masked] / module.threshold[masked]
    factor, live = threshold_for(ratios, max(0.0, adapter.live - always))
    module.threshold *= factor
    return replace(adapter, threshold=adapter.threshold * factor, live=live + always)


def _fit_rounded(module: Factored, adapter: AdapterSpec, x: Tensor, rounding: Rounding) -> AdapterSpec:
    """Fit the thresholds and round the weights. Thresholds of ranks are fitted to the rounded B."""
    fitted = _fit(module, adapter, x)
    if not isinstance(module, FactoredLinear):
        rounding.round_neurons(module, fitted, x.float())
        return fitted
    wanted = outputs(module, x.float())
    rounding.round_B(module, fitted, x.float())
    fitted = _fit(module, fitted, x)
    rounding.round_ranks(module, fitted, x.float(), wanted)
    return fitted
