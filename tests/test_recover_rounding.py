"""Recovery of quantised models without PEFT: weights become floats, and are rounded again with thresholds."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.model.head import head_names
from rana_kernels.nn.factored import factored, from_linears, to_linears
from rana_kernels.nn.floats import to_floats
from rana_kernels.recovery import rounding as rounding_module
from rana_kernels.recovery.refit import refit
from rana_kernels.recovery.rounding import install_rounded, rounding_of
from tests.test_compress import hand_plan, logits, make_model, tokens

PLANS = {
    "separate ranks": {}, "joint ranks": {"joint": True}, "joint neurons": {"joint": True, "first": "neuron"},
    "neurons": {"first": "neuron", "o": "neuron"},
}  # fmt: skip


def quantised(name: str = "Llama", plan: str = "separate ranks", bits: int = 4) -> nn.Module:
    model = make_model(name)
    made = hand_plan(model, **PLANS[plan])
    own = tuple(replace(adapter, bits=bits, group=32) for adapter in made.adapters)
    rana.compress(model, [tokens()], plan=made.with_adapters(own), progress=False)
    return model


def in_floats(model: nn.Module) -> nn.Module:
    """Return the factored form of a quantised model, a copy of it."""
    made = copy.deepcopy(model)
    rounding = rounding_of(made)
    to_floats(made, rounding.names, rounding.dtype)
    to_linears(made, skip=head_names(made))
    return made


def rounded_again(made: nn.Module, rounding) -> nn.Module:
    refit(made, tokens(), rounding)
    from_linears(made)
    install_rounded(made, rounding)
    return made


def away(model: nn.Module, wanted: torch.Tensor) -> float:
    return float((logits(model) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *(("Llama", plan) for plan in PLANS),
        ("Phi3", "joint ranks"),
        ("OPT", "neurons"),
        ("GPT2", "joint neurons"),
    ],
)
def test_in_floats_it_computes_the_same_and_rounded_again_nearly(name, plan):
    model = quantised(name, plan)
    wanted, shapes = logits(model), {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    made = in_floats(model)
    assert not any(t.dtype in (torch.int8, torch.uint8) for t in made.state_dict().values())
    assert away(made, wanted) < 1e-5
    again = rounded_again(made, rounding_of(model))
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == shapes
    assert away(again, wanted) < (0.01 if "neuron" in plan else 0.05)  # the rows of ranks are refitted
    assert attached_plan(again).bits == (4,)


def test_new_weights_are_rounded_with_the_inputs_that_they_meet(monkeypatch):
    """Errors of rounding are spread (GPTQ): the model loses less than by rounding to nearest."""
    model = quantised("Llama", "neurons")
    made = in_floats(model)
    with torch.no_grad():
        for _, module in factored(made):
            module.rows.weight += 0.02 * torch.randn_like(module.rows.weight)
    wanted, plain = logits(made), copy.deepcopy(made)
    good = away(rounded_again(made, rounding_of(model)), wanted)
    quantize = rounding_module.quantize
    monkeypatch.setattr(
        rounding_module,
        "quantize",
        lambda w, bits, group, moment, **how: quantize(w, bits, group, None, **how),
    )
    nearest = away(rounded_again(plain, rounding_of(model)), wanted)
    assert 0 < good < 0.9 * nearest
