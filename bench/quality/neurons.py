"""SmolLM2 with masks on inputs alone, so that its dial ends without masks."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import rana_kernels as rana
from bench.quality.smollm2 import read_text
from rana_kernels.model.plan import AdapterSpec, Plan, Setting

PLANNED = 0.8  # the cost ratio of the plan, from whose curves the other budgets come. It has few ranks


def compressed(folder: Path, bits: int, calibration: int) -> PreTrainedModel:
    """Return the model of `folder`, compressed on so many tokens of its calibration text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rows = read_text(folder, "calibration", calibration)
    stats = rana.calibrate(model, list(rows.split(4)))
    plan = without_ranks(rana.plan(stats, flops_reduction=1 - PLANNED, bits=bits))
    rana.compress(model, stats=stats, plan=plan)
    return model


def without_ranks(plan: Plan) -> Plan:
    """Return the plan with a neuron adapter that keeps all in place of each rank adapter, at every budget."""
    settings = max(len(adapter.settings) for adapter in plan.adapters)
    adapters: list[AdapterSpec] = []
    for adapter in plan.adapters:
        if adapter.kind != "rank":
            adapters.append(adapter)
            continue
        K = adapter.in_features
        for name, width in zip(adapter.names, adapter.out_features, strict=True):
            adapters.append(replace(
                adapter, kind="neuron", names=(name,), out_features=(width,), rank=K, live=float(K),
                threshold=0.0, settings=(Setting(float(K), 0.0),) * settings,
            ))  # fmt: skip
    return plan.with_adapters(tuple(adapters))
