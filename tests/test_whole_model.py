"""One budget for a model: what the loss says about errors, and where multiply-adds are spent."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from rana_kernels import load, save
from rana_kernels.allocation.curves import JOINT, BlockOffers
from rana_kernels.allocation.methods import plan
from rana_kernels.allocation.pricing import Pricing
from rana_kernels.allocation.spending import Choice, least_cost, least_memory, spend
from rana_kernels.compression.run import compress
from rana_kernels.model.architectures import find_blocks
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.adapters import RanaReceiver
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.statistics import fisher
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import calibrate
from rana_kernels.statistics.decomposition import decompose
from rana_kernels.statistics.fisher import drawn
from rana_kernels.statistics.thresholds import threshold_for
from tests.test_compress import hand_plan, logits, make_model, tokens

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "demo_model"


# what the loss says


def test_tokens_are_drawn_as_the_model_predicts_them():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20_000, 4)
    found = drawn(logits, 3)
    shares = found.bincount(minlength=4) / len(found)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.015, rtol=0)
    assert (
        shares[2] == 0 and torch.equal(drawn(logits, 3), found) and not torch.equal(drawn(logits, 4), found)
    )


def test_gradients_are_those_of_the_loss_of_drawn_tokens():
    model, ids = make_model(), tokens(2, 12)
    found = calibrate(model, [ids], progress=False).gradients
    name = "model.layers.1.mlp.up_proj"
    total = torch.zeros(model.config.intermediate_size, dtype=torch.float64)
    for i, row in enumerate(ids):
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, args, y, outputs=outputs: outputs.append(y)
        )
        y = model(row[None]).logits[0, :-1]
        labels = drawn(y.detach(), i * ids.shape[1])
        (slope,) = torch.autograd.grad(F.cross_entropy(y, labels, reduction="sum"), outputs)
        total += slope[0].double().square().sum(0)
        handle.remove()
    torch.testing.assert_close(found[name], total / ids.numel(), rtol=1e-5, atol=0)
    assert set(found) == {"lm_head", *(n for block in find_blocks(model) for n in block.linears)}


def test_gradients_leave_the_model_and_the_other_statistics_as_they_are():
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    a = calibrate(model, [tokens()], progress=False)
    b = calibrate(model, [tokens()], gradients=False, progress=False)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    for key, found in b.inputs.items():
        assert torch.equal(found.moment, a.inputs[key].moment)
        assert torch.equal(found.sample, a.inputs[key].sample)


def test_slopes_are_derivatives_by_inputs_through_one_linear_alone():
    """The slopes of all readers of one input add up to the derivative by it.

    Its tokens are the paired ones.
    """
    model, ids = make_model(), tokens(1, 30)
    stats = calibrate(model, [ids], progress=False)
    held = []

    def hold(_module, args):
        args[0].retain_grad()
        held.append(args[0])

    layer = model.model.layers[1]
    hooks = [module.register_forward_pre_hook(hold) for module in (layer.mlp.up_proj, layer.mlp.down_proj)]
    logits = model(ids).logits[0, :-1]
    F.cross_entropy(logits, drawn(logits.detach(), 0), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    calibrated = CalibratedBlock(model, find_blocks(model)[1], stats)
    both = sum(calibrated.slopes(f"model.layers.1.mlp.{name}_proj") for name in ("up", "gate"))
    close = {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(both, held[0].grad[0], **close)
    torch.testing.assert_close(calibrated.slopes("model.layers.1.mlp.down_proj"), held[1].grad[0], **close)
    torch.testing.assert_close(calibrated.paired("mlp"), held[0].detach()[0])
    torch.testing.assert_close(calibrated.paired("down"), held[1].detach()[0])


def test_importance_is_that_of_the_derivatives_by_the_outputs_of_all_readers():
    model, ids = make_model(), tokens(1, 50)
    stats = calibrate(model, [ids], sample_tokens=1000, progress=False)
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
        weights, held = torch.zeros(ids.numel()), {}
        for name in names:
            module = model.get_submodule(f"model.layers.1.self_attn.{name}")

            def hold(_module, args, output, held=held, weights=weights):
                held["x"] = args[0][0].detach()

                def add(slope):
                    weights.add_(slope[0].square().sum(1))

                output.register_hook(add)

            handle = module.register_forward_hook(hold)
            predictions = model(ids).logits[0, :-1]
            F.cross_entropy(predictions, drawn(predictions.detach(), 0), reduction="sum").backward()
            handle.remove()
        weights /= weights.mean()
        key = (1, "o" if names == ("o_proj",) else "qkv")
        torch.testing.assert_close(stats.importance[key], weights, rtol=1e-4, atol=1e-6)
        expected = (held["x"] * weights[:, None]).T @ held["x"] / ids.numel()
        torch.testing.assert_close(stats.weighed[key], expected, rtol=1e-4, atol=1e-6)


def test_importance_is_one_where_the_loss_was_not_differentiated(monkeypatch):
    monkeypatch.setattr(fisher, "TOKENS", 50)
    stats = calibrate(make_model(), [tokens(1, 50), tokens(1, 30)], sample_tokens=1000, progress=False)
    for found in stats.importance.values():
        assert len(found) == 80 and float(found[:50].std()) > 0
        assert torch.equal(found[50:], torch.ones(30))


def test_padding_has_no_gradients():
    model, ids = make_model(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    plain = calibrate(model, [ids[:, :15]], progress=False)
    for name, found in plain.gradients.items():
        torch.testing.assert_close(padded.gradients[name], found, rtol=1e-4, atol=1e-12)


def test_a_model_without_a_head_has_no_loss():
    with pytest.raises(ValueError, match="gives no logits, wanted a model with a language-model head"):
        calibrate(make_model().model, [tokens()], progress=False)


# the metric


@pytest.mark.parametrize(("N", "K"), [(40, 24), (24, 40), (32, 32)])
def test_the_weighted_error_of_a_mask_is_the_energy_it_drops(N, K):
    torch.manual_seed(0)
    W, X, d = torch.randn(N, K), torch.randn(200, K), torch.rand(N).double() * 3 + 0.01
    moment = (X.T @ X).double()
    factors = decompose(W, moment, d)
    torch.testing.assert_close(factors.rows.norm(dim=1), torch.ones(min(N, K)))
    h = X @ factors.B.T
    score = h / factors.norms
    torch.testing.assert_close(score.double().square().sum(0), factors.energy, rtol=1e-3, atol=1e-2)
    kept = torch.where(score.abs() < score.abs().median(), 0, h)
    error = (X @ W.T - kept @ factors.rows) * d.float()
    dropped = score.masked_fill(kept != 0, 0)
    torch.testing.assert_close(error.square().sum(), dropped.square().sum(), rtol=1e-4, atol=1e-3)


def test_the_moment_of_outputs_decomposes_as_that_of_inputs():
    torch.manual_seed(0)
    W, X, d = torch.randn(24, 40), torch.randn(300, 40), torch.rand(24).double() + 0.1
    Y = X @ W.T
    a, b = decompose(W, (X.T @ X).double(), d), decompose(W, (Y.T @ Y).double(), d)
    torch.testing.assert_close(a.energy, b.energy, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close((a.rows @ b.rows.T).abs().diagonal(), torch.ones(24), rtol=1e-3, atol=0)


# spending


def choice(cost: float, error: float, size: int = 0) -> Choice:
    return Choice(cost, size, error, AdapterSpec("dense", (f"{cost} {error}",), 1, (1,)))


def random_curve(generator: torch.Generator) -> list[Choice]:
    """At each cost a few, of which those that store more lose less."""
    draw = lambda n: torch.rand(n, generator=generator).tolist()  # noqa: E731
    (steepness,), costs = draw(1), sorted(draw(6))
    return [
        choice(10 * c, math.exp(-(3 * steepness + 0.3) * 10 * c) * 2 ** (-s / 40), int(s + 30 * c))
        for c in costs
        for s in (10, 30, 70)
    ]


def random_ways(generator: torch.Generator) -> list:
    """One curve, or else two others."""
    return [[random_curve(generator)], [random_curve(generator) for _ in range(2)]]


def everything(curves: list) -> list[tuple[float, float, float]]:
    """Cost, bytes and error of all there is to choose."""
    return [
        (sum(c.cost for c in cs), sum(c.bytes for c in cs), sum(c.error for c in cs))
        for ways in product(*curves)
        for cs in product(*(curve for way in ways for curve in way))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_spending_is_close_to_the_best_there_is(seed):
    generator = torch.Generator().manual_seed(seed)
    curves = [random_ways(generator), [[random_curve(generator)]]]
    points = everything(curves)
    for limit, room in product((8.0, 14.0, 20.0), (None, 190, 120, 80, 60)):
        within = [(b, e) for c, b, e in points if c <= limit * (1 + 1e-9)]
        chosen = spend(curves, limit, room)
        fitting = [e for b, e in within if room is None or b <= room]
        if not fitting:
            assert chosen is None
        if not within:
            assert least_memory(curves, limit) is None and least_cost(curves) > limit
        if chosen is None:  # of points that no price buys some may fit: between those of the hulls
            assert not fitting or room < least_memory(curves, limit) <= 1.5 * min(b for b, _ in within)
            continue
        assert sum(c.cost for c in chosen) <= limit * (1 + 1e-6)
        assert room is None or sum(c.bytes for c in chosen) <= room
        assert sum(c.error for c in chosen) <= min(fitting) * 2 + 0.1


def test_a_cap_that_changes_nothing_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    curves = [random_ways(generator) for _ in range(4)]
    chosen = spend(curves, 30)
    stored = sum(c.bytes for c in chosen)
    assert spend(curves, 30, stored) == chosen
    fewer = spend(curves, 30, stored - 1)
    assert sum(c.bytes for c in fewer) < stored and sum(c.error for c in fewer) > sum(c.error for c in chosen)


def test_nothing_is_spent_where_nothing_is_affordable():
    curves = [[[[choice(5, 1, 2), choice(6, 0, 4)]]]]
    assert spend(curves, 4) is None and least_cost(curves) == 5
    assert [c.cost for c in spend(curves, 5)] == [5] and [c.cost for c in spend(curves, 6)] == [6]
    assert [c.cost for c in spend(curves, 6, 3)] == [5] and spend(curves, 6, 1) is None
    assert least_memory(curves, 6) == 2


# the plan


def test_a_plan_has_every_linear_once_in_the_metric_of_the_loss():
    model = make_model("Qwen2")
    stats = calibrate(model, [tokens()], progress=False)
    made = plan(stats, flops_reduction=0.5, progress=False)
    assert made.method == "global" and made.reduction == pytest.approx(0.5, abs=0.002)
    assert [n for a in made.adapters for n in a.names] == [
        n for block in find_blocks(model) for n in block.linears
    ]
    assert {a.metric for a in made.adapters if a.kind != "dense"} == {"loss"}


def test_a_linear_that_the_loss_does_not_see_gets_little():
    """Which layer a budget goes to follows the gradients, not the size of the outputs."""
    stats = calibrate(make_model(), [tokens()], progress=False)
    blind = {n: g * (1e-8 if ".0." in n else 1) for n, g in stats.gradients.items()}
    flat = {n: v * (1e-4 if ".0." in n else 1) for n, v in stats.slopes.items()}
    made = plan(replace(stats, gradients=blind, slopes=flat), flops_reduction=0.5, progress=False)
    spent = [sum(a.flops for a in made.adapters if f".{i}." in a.names[0]) for i in (0, 1)]
    assert spent[0] < 0.2 * spent[1]


def test_errors_of_the_curves_are_what_the_modules_do():
    """A choice's error is what its adapter makes on the sample: weighted outputs, or rises of the loss."""
    model = make_model()
    stats = calibrate(model, [tokens()], progress=False)
    block = find_blocks(model)[0]
    layer = CalibratedBlock(model, block, stats)
    for names in (block.qkv, (block.down,), (block.o,)):
        x = layer.sample(layer.input_of(names))
        y = x @ layer.weight(names).T
        offers = BlockOffers(layer, Pricing())
        curve = [*offers.ranks(names), *offers.neurons(names)]
        for point in curve[::7]:
            adapter = point.adapter
            if adapter.kind == "rank":
                factors = layer.factors(names, "loss")
                h, rows = x @ factors.B[: adapter.rank].T, factors.rows[: adapter.rank]
                score = h.abs() / factors.norms[: adapter.rank]
                threshold, _ = threshold_for(score, adapter.live)
                approximate = torch.where(score < threshold, 0, h) @ rows
                error = ((y - approximate) * layer.output_weights(names).float()).square().sum(1).mean()
            else:
                seen = layer.paired(layer.input_of(names))
                score = seen.abs() * layer.joint_norms(names, "loss")
                dropped = torch.where(score < threshold_for(score, adapter.live)[0], seen, 0)
                rises = [(layer.slopes(name) * dropped).sum(1).square().mean() for name in names]
                error = sum(rises) * (JOINT if len(names) > 1 else 1)
            assert point.error == pytest.approx(float(error), rel=0.05, abs=2e-3 * curve[0].error), adapter


@pytest.mark.parametrize("factor", [1, 1e4])
def test_linears_that_lose_the_same_share_one_mask(factor):
    """Of two equal linears a common mask loses nothing. If only one of them matters, each gets its own."""
    model = make_model(num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data.copy_(mlp.gate_proj.weight)
    stats = calibrate(model, [tokens()], progress=False)
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    squares = stats.gradients | {up: factor * stats.gradients[gate]}
    slopes = stats.slopes | {up: factor**0.5 * stats.slopes[gate]}
    made = plan(replace(stats, gradients=squares, slopes=slopes), flops_reduction=0.3, progress=False)
    of_mlp = [a for a in made.adapters if "mlp.gate" in a.names[0] or "mlp.up" in a.names[0]]
    assert [(a.kind, len(a.names)) for a in of_mlp] == [("neuron", 2)] if factor == 1 else len(of_mlp) == 2


def test_a_model_of_joint_neurons_comes_back(tmp_path):
    model = make_model()
    report = compress(model, [tokens()], flops_reduction=0.2, progress=False)
    joint = [a for a in report.plan.adapters if a.kind == "neuron" and len(a.names) > 1]
    assert joint and all(a.metric == "loss" and 0 < a.live < a.in_features for a in joint)
    whole = [m for m in model.modules() if isinstance(m, RanaMLP) and m.B is None]
    assert len(whole) == len(joint) and all(m.norms.shape == (64,) for m in whole)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    assert torch.equal(logits(again), logits(model))


def model_of_joint_neurons() -> nn.Module:
    model = make_model(num_hidden_layers=1)
    made = hand_plan(model, joint=True, first="neuron")
    halved = tuple(a if a.kind == "dense" else replace(a, threshold=None, live=32) for a in made.adapters)
    compress(model, [tokens()], plan=made.with_adapters(halved), progress=False)
    return model


def test_many_threads_call_one_model_of_joint_neurons():
    model, ids = model_of_joint_neurons(), [tokens(1, 8) + i for i in range(8)]
    assert isinstance(model.model.layers[0].self_attn.k_proj, RanaReceiver)

    @torch.inference_mode()
    def call(i: int) -> torch.Tensor:
        return model(ids[i] % 128).logits

    wanted = [call(i) for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            found = list(threads.map(call, range(8)))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_full_rank_in_the_metric_of_the_loss_is_the_dense_model(joint):
    model = make_model()
    dense = logits(model)
    made = hand_plan(model, joint)
    made = made.with_adapters(tuple(replace(a, metric="loss") for a in made.adapters))
    compress(model, [tokens()], plan=made, progress=False)
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-5)


def test_thresholds_of_ranks_are_their_own():
    model = make_model()
    made = hand_plan(model)
    adapters = [a if a.kind == "dense" else replace(a, metric="loss", threshold=0.01) for a in made.adapters]
    stats = calibrate(model, [tokens()], progress=False)
    block = find_blocks(model)[0]
    norms = CalibratedBlock(model, block, stats).factors(block.qkv, "loss").norms
    compress(model, stats=stats, plan=made.with_adapters(tuple(adapters)), progress=False)
    threshold = model.get_submodule(block.qkv[0]).threshold
    torch.testing.assert_close(threshold, 0.01 * norms)
    assert threshold.unique().numel() > 10


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.56, 0.35])
def test_the_gap_to_dense_is_a_fraction_of_the_paper_methods(keep):
    from transformers import AutoModelForCausalLM

    held_out = load_file(DEMO_MODEL / "evaluation.safetensors")["input_ids"][:64].long()
    text = load_file(DEMO_MODEL / "calibration.safetensors")["input_ids"].long().split(8)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()

    @torch.inference_mode()
    def loss(model: nn.Module) -> float:
        parts = [
            F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for ids in held_out.split(4)
        ]
        return float(torch.stack(parts).mean())

    losses = {"dense": loss(load())}
    for method in ("global", "paper", "static"):
        compress(model := load(), text, flops_reduction=1 - keep, method=method, progress=False)
        losses[method] = loss(model)
    gaps = {method: found - losses["dense"] for method, found in losses.items()}
    assert 0 < gaps["global"] < 0.42 * gaps["paper"] < 0.42 * gaps["static"], losses
