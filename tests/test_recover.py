"""Recovery without PEFT: adapters in two factors, training, thresholds fitted again, the ranks of LoRA."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.cli import recover as command
from rana_kernels.evaluation.live import count_live
from rana_kernels.nn.factored import FactoredLinear, FactoredNeurons, factored, from_linears, to_linears
from rana_kernels.recovery import lora_ranks, training
from rana_kernels.recovery.refit import refit
from rana_kernels.recovery.training import Training, learning_rate, train
from tests.test_cli import compressed, folder, run  # noqa: F401 - fixtures
from tests.test_compress import assert_equal_states, hand_plan, logits, make_model, tokens

MODELS = ("Llama", "Phi3", "GPTNeoX", "OPT", "GPT2")


def adapted(name: str = "Llama", **how) -> nn.Module:
    model = make_model(name)
    how = how or {"flops_reduction": 0.3, "method": "paper"}
    rana.compress(model, [tokens()], progress=False, **how)
    return model


# in factors and back


@pytest.mark.parametrize(
    ("joint", "first"),
    [(False, "rank"), (True, "rank"), (True, "neuron")],
    ids=["separate", "joint", "neurons"],
)
@pytest.mark.parametrize("name", MODELS)
def test_factored_it_is_the_same_model_and_closed_the_same_bits(name, joint, first):
    model = adapted(name, plan=hand_plan(make_model(name), joint, first=first))
    wanted, again = logits(model), copy.deepcopy(model)
    to_linears(again)
    kind = FactoredLinear if first == "rank" else FactoredNeurons
    assert any(isinstance(module, kind) for _, module in factored(again))
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
    from_linears(again)
    assert not list(factored(again))
    assert_equal_states(model, again)
    assert torch.equal(logits(again), wanted)


def test_factors_share_the_memory_of_the_adapters():
    model = adapted()
    owner = model.model.layers[0].self_attn.q_proj
    to_linears(model)
    made = model.model.layers[0].self_attn.q_proj
    assert made.B.weight.data_ptr() == owner.B.data_ptr()
    assert made.rows.weight.data_ptr() == owner.rows.data_ptr()


# training


def trainable() -> nn.Module:
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(True)
    return model


HOW = Training(steps=12, batch=2, accumulate=2, learning_rate=5e-3)


def test_an_interrupted_training_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    state, rows, whole = tmp_path / "state.safetensors", tokens(7), trainable()
    losses = train(whole, rows, HOW, progress=False)
    differentiate, calls = training._differentiate, 0
    monkeypatch.setattr(training, "SAVED_EVERY", 4)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 2 * 11:
            raise KeyboardInterrupt
        return differentiate(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_differentiate", interrupted)
        train(trainable(), rows, HOW, state=state, progress=False)
    again = trainable()
    assert train(again, rows, HOW, state=state, progress=False) == losses[8:]
    assert_equal_states(whole, again)
    assert losses[-1] < losses[0] - 0.1 and [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_training_goes_on_only_from_its_own_state(tmp_path):
    state, rows = tmp_path / "state.safetensors", tokens(7)
    train(trainable(), rows, HOW, state=state, progress=False)
    one_more = replace(HOW, steps=HOW.steps + 1)
    fewer = trainable()
    fewer.model.layers[0].requires_grad_(False)
    for wanted, model, text, how, dense in [
        ("steps 12, asked for 13", trainable(), rows, one_more, None),
        ("learning rate 0.005, asked for 0.01", trainable(), rows, replace(HOW, learning_rate=0.01), None),
        ("seed 0, asked for 3; another text", trainable(), tokens(6), replace(HOW, seed=3), None),
        ("distilled False, asked for True", trainable(), rows, HOW, make_model()),
        ("another choice of weights", fewer, rows, HOW, None),
    ]:
        with pytest.raises(ValueError, match=rf"training of another kind \({wanted}\): ask for the same"):
            train(model, text, how, dense=dense, state=state, progress=False)


def test_distilling_brings_the_predictions_closer():
    dense, model = make_model(), trainable()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += 0.03 * torch.randn_like(parameter)

    def divergence() -> float:
        ours, theirs = logits(model).log_softmax(-1), logits(dense).log_softmax(-1)
        return float(F.kl_div(ours, theirs, reduction="sum", log_target=True))

    before = divergence()
    losses = train(model, tokens(), Training(20, 2, 1, 2e-3), dense=dense, progress=False)
    assert divergence() < 0.5 * before and losses[-1] < losses[0]


def test_the_rate_rises_and_falls():
    rates = [learning_rate(Training(steps=100, learning_rate=1.0), step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.001


def test_trainings_that_cannot_be():
    with pytest.raises(ValueError, match="the text has 2 rows, wanted at least a batch of 4"):
        train(trainable(), tokens(2), Training(), progress=False)
    with pytest.raises(ValueError, match="steps is 0, wanted at least 1"):
        Training(steps=0)
    model = trainable()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train(model, tokens(), Training(1), progress=False)


# thresholds


@pytest.mark.parametrize("method", ["paper", "global"])
def test_refitted_thresholds_keep_what_was_planned(method):
    model = adapted(flops_reduction=0.4, method=method)
    planned = attached_plan(model)
    to_linears(model)
    with torch.no_grad():
        for _, module in factored(model):
            module.rows.weight *= 1.2
            if isinstance(module, FactoredLinear):
                module.B.weight *= 0.6
    refit(model, tokens())
    from_linears(model)
    fitted = attached_plan(model)
    assert fitted.reduction == pytest.approx(planned.reduction, abs=1e-3)
    with count_live(model) as counts, torch.no_grad():
        model(input_ids=tokens())
    for before, after in zip(planned.adapters, fitted.adapters, strict=True):
        assert after.names == before.names and after.rank == before.rank
        if after.kind != "dense":
            assert after.live == pytest.approx(before.live, abs=0.05)
            assert counts[after.names[0]].mean == pytest.approx(after.live, rel=0.01, abs=0.05)
            assert after.kind == "neuron" or after.threshold < before.threshold


def test_ranks_that_are_always_on_stay_so():
    model = adapted(flops_reduction=0.3, method="static")
    planned = attached_plan(model)
    to_linears(model)
    refit(model, tokens())
    assert attached_plan(model) == planned
    assert all((module.threshold == 0).all() for _, module in factored(model))


# ranks of LoRA


@pytest.mark.parametrize("name", MODELS)
def test_shared_out_ranks_take_no_more_weights_than_equal_ones(name):
    model = adapted(name)
    to_linears(model)
    inputs, owner = lora_ranks.inputs_of(model)
    assert sum(own.share for own in inputs) == pytest.approx(1) and set(owner.values()) == set(
        range(len(inputs))
    )

    def weights(ranks: dict[str, int]) -> int:
        return sum(rank * sum(model.get_submodule(name).weight.shape) for name, rank in ranks.items())

    equal = lora_ranks.ranks(model, owner, torch.zeros(len(inputs)), 8)
    assert set(equal.values()) == {8} and equal.keys() == owner.keys()
    shared = lora_ranks.ranks(model, owner, torch.randn(len(inputs)), 8)
    assert len(set(shared.values())) > 1 and 0.6 * weights(equal) < weights(shared) <= weights(equal)
    assert {shared[name] for name, place in owner.items() if place == 0} == {shared[next(iter(owner))]}


# the command


def test_without_peft_one_line_says_what_to_install(folder, compressed, tmp_path, run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, out, err = run("recover", compressed, "--text", folder / "text.txt", "-o", tmp_path / "out")
    assert (code, out) == (1, "") and err == "rana: rana recover needs PEFT: pip install rana_kernels[peft]\n"
