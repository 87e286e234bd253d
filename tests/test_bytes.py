"""A budget of bytes: what a token reads, the bits of every linear, lm_head, and the loss by rounding."""

import json
from dataclasses import replace

import pytest
import torch

import rana_kernels as rana
from rana_kernels.allocation import curves
from rana_kernels.allocation.curves import BlockOffers
from rana_kernels.allocation.pricing import Pricing
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.model_card import describe_bits
from rana_kernels.compression import run as compression_run
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.dense import QuantizedLinear
from rana_kernels.nn.format import FLOAT, Format
from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization import quantize
from rana_kernels.quantization.loss import SHARES, NeuronLoss, RoundingLoss
from rana_kernels.quantization.refit import refit
from rana_kernels.quantization.rounding import column_errors, row_errors, unexplained_inputs
from rana_kernels.statistics.block import CalibratedBlock
from tests.test_bits import written
from tests.test_cli import compression, folder, run  # noqa: F401 - fixtures
from tests.test_compress import assert_equal_states, logits, make_model, tokens
from tests.test_quantization import correlated

FORMATS = (FLOAT, Format(8, 32), Format(4, 32))


@pytest.fixture(autouse=True)
def few_shares(monkeypatch):
    """A third of the choices is enough for tests."""
    monkeypatch.setattr(curves, "SHARES", curves.SHARES[::3])


def compressed(asked: dict, architecture: str = "Llama", **sizes):
    model = make_model(architecture, **{"num_hidden_layers": 1, **sizes})
    return model, rana.compress(model, [tokens()], progress=False, **asked)


# the budget


@pytest.mark.parametrize(
    ("bits", "reduction", "architecture"),
    [
        (16, 0.2, "Llama"),
        (8, 0.8, "Llama"),
        (4, 0.87, "Llama"),
        ("auto", 0.85, "Llama"),
        ("auto", 0.8, "Qwen2"),
    ],
)
def test_a_token_reads_what_was_asked_for(bits, reduction, architecture):
    model, report = compressed({"bytes_reduction": reduction, "bits": bits}, architecture)
    saved = 1 - report.read_bytes_after / report.read_bytes_before
    assert reduction - 0.002 <= saved <= reduction + 0.03
    assert report.plan.bytes_reduction == reduction and logits(model).isfinite().all()
    assert set(report.plan.bits) <= ({16, 8, 4} if bits == "auto" else {bits})


def test_a_plan_of_many_bits_and_a_masked_lm_head_comes_back(tmp_path):
    model, report = compressed({"bytes_reduction": 0.85, "bits": "auto"})
    plan = report.plan
    assert len({a.bits for a in plan.all_adapters}) > 1 and plan.lm_head is not None
    assert "linears)" in describe_bits(plan) or len(plan.bits) == 1
    assert Plan.from_json(plan.to_json()) == plan
    rana.save(model, tmp_path / "out")
    again = rana.load(tmp_path / "out")
    assert_equal_states(model, again)
    assert attached_plan(again) == plan
    assert torch.equal(logits(model), logits(again)) and written(model) == written(again)


@pytest.mark.parametrize("kind", ["neuron", "rank"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_lm_head_is_made_and_loaded(kind, bits, tied, tmp_path):
    model = make_model(num_hidden_layers=1, tie_word_embeddings=tied)
    dense, embedding = logits(model), model.get_input_embeddings().weight.clone()
    stats = rana.calibrate(model, [tokens()], progress=False)
    made = rana.plan(stats, flops_reduction=0.01, progress=False)
    group = None if bits == 16 else 32
    head = AdapterSpec(kind, ("lm_head",), 64, (128,), 64, 60.0, metric="loss", bits=bits, group=group)
    rana.compress(model, stats=stats, plan=replace(made, lm_head=head), progress=False)
    assert 0 < float((logits(model) - dense).norm() / dense.norm()) < 0.2
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    rana.save(model, tmp_path / "out")
    again = rana.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(again)) and written(model) == written(again)
    assert attached_plan(again).lm_head.live == pytest.approx(60, abs=1)


def test_bits_cost_what_a_token_reads():
    model = make_model(num_hidden_layers=1)
    stats = rana.calibrate(model, [tokens()], progress=False)
    layer = CalibratedBlock(model, stats.blocks[0], stats)
    offers = BlockOffers(layer, Pricing(FORMATS, in_bytes=True))
    for choice in [*offers.of_linear(stats.blocks[0].o), *offers.ranks(stats.blocks[0].qkv)]:
        assert choice.cost == pytest.approx(choice.adapter.read_bytes(4))
        assert choice.bytes == choice.adapter.stored_bytes(4)


def test_fewer_bits_lose_more():
    model = make_model(num_hidden_layers=1)
    stats = rana.calibrate(model, [tokens()], progress=False)
    layer = CalibratedBlock(model, stats.blocks[0], stats)
    offers = BlockOffers(layer, Pricing(FORMATS, in_bytes=True))
    for curve in (offers.dense, lambda name: offers.ranks((name,)), lambda name: offers.neurons((name,))):
        found = list(curve(stats.blocks[0].o))
        best = [min(c.error for c in found if c.adapter.bits == bits) for bits in (16, 8, 4)]
        assert best[0] < best[1] < best[2]


def test_an_interrupted_lm_head_goes_on(tmp_path, monkeypatch):
    asked = {"bytes_reduction": 0.85, "bits": 4}
    whole, _ = compressed(asked)
    quantized = compression_run.quantize_block

    def interrupted(calibrated, *arguments):
        if calibrated.block.head:
            raise KeyboardInterrupt
        return quantized(calibrated, *arguments)

    monkeypatch.setattr(compression_run, "quantize_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compressed({**asked, "resume_dir": tmp_path})
    monkeypatch.setattr(compression_run, "quantize_block", quantized)
    resumed, _ = compressed({**asked, "resume_dir": tmp_path})
    assert_equal_states(whole, resumed)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"flops_reduction": 0.3, "bits": "auto"},
            "bits is 'auto' and flops_reduction is given, wanted bytes",
        ),
        ({"flops_reduction": 0.3, "lm_head_bits": "auto"}, "lm_head_bits is 'auto' and flops_reduction"),
        ({"bytes_reduction": 0.3, "method": "paper"}, "does not count bytes: .* wants method 'global'"),
        ({"bytes_reduction": 0.3, "flops_reduction": 0.3}, "wanted exactly one of them"),
        ({"bytes_reduction": 0.999, "bits": 16}, "wanted more than 0 and at most 0.9"),
        ({"bytes_reduction": 0.5, "bits": "all"}, "bits is 'all', wanted 16, 8 or 4"),
    ],
)
def test_what_no_budget_of_bytes_can_be_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        compressed(asked)


def test_a_budget_of_bytes_by_command(folder, tmp_path, run):  # noqa: F811
    options = ("--bytes-reduction", 0.7, "--bits", "auto", "--json")
    code, out, err = run(*compression(folder, tmp_path / "out"), *options)
    found = json.loads(out)
    assert code == 0, err
    assert found["read_bytes_after"] == pytest.approx(0.3 * found["read_bytes_before"], rel=0.05)
    assert found["plan"]["bytes_reduction"] == 0.7
    code, out, _ = run("info", tmp_path / "out", "--json")
    assert code == 0 and sum(json.loads(out)["linears_by_bits"].values()) == 14
    assert "bytes saved that a token reads" in (tmp_path / "out" / "README.md").read_text()


# the loss by rounding


@pytest.mark.parametrize("bits", [8, 4])
def test_the_loss_of_gptq_is_known_before(bits):
    weight, moment = torch.randn(96, 128) * 0.02, correlated(128) / 400

    def lost(found: torch.Tensor, line: str) -> float:
        error = (found - weight).double() if line == "columns" else (found - weight).double().T
        return float(torch.trace(error @ moment @ error.T))

    def rounded(moment, along):
        q, scale = quantize(weight, bits, 32, moment, along=along)
        return dequantize(q, scale, 128)

    expected = float(column_errors(weight, bits, 32, moment, unexplained_inputs(moment)).sum())
    assert 0.8 < expected / lost(rounded(moment, "columns"), "columns") < 1.5
    moment = correlated(96) / 400
    expected = float(unexplained_inputs(moment) @ row_errors(weight, bits, 32, torch.ones(128)))
    assert 0.8 < expected / lost(rounded(moment, "rows"), "rows") < 1.5  # damping is in the estimate only
    assert expected < 0.7 * lost(rounded(None, "rows"), "rows")


def test_the_loss_of_dense_linears_is_that_of_their_modules():
    model = make_model(num_hidden_layers=1)
    stats = rana.calibrate(model, [tokens(30)], progress=False)
    layer = CalibratedBlock(model, stats.blocks[0], stats)
    name, loss = stats.blocks[0].o, RoundingLoss(layer)
    expected = loss.dense(name, Format(4, 32))
    x, weight, metric = layer.sample("o"), layer.weight((name,)), layer.output_weights((name,)).float()
    q, scale = quantize(weight, 4, 32, loss.moments.of_input((name,)))
    error = (x @ (dequantize(q, scale, 64) - weight).T * metric).square().sum() / len(x)
    assert expected == pytest.approx(float(error), rel=0.3)


def test_the_loss_of_neurons_lies_between_its_points():
    loss = NeuronLoss((0.0, 3.0, 4.0, 5.0, 6.0))
    assert [loss.at(share) for share in SHARES] == [0.0, 3.0, 4.0, 5.0, 6.0]
    assert loss.at(0.85) == pytest.approx(5.5)


def test_rows_make_good_what_a_rounded_B_does():
    torch.manual_seed(0)
    x = torch.randn(800, 48) @ torch.randn(48, 48) * 0.2
    weight = torch.randn(40, 48)
    rows, threshold = torch.linalg.svd(weight @ x.T, full_matrices=False)[0].T[:32], torch.full((32,), 0.3)
    B = rows @ weight
    q, scale = quantize(B, 4, 32, (x.T @ x).double())
    coarse = dequantize(q, scale, 48)

    def lost(B, rows):
        h = x @ B.T
        return float((x @ weight.T - torch.where(h.abs() >= threshold, h, 0) @ rows).square().sum())

    exact, rounded = lost(B, rows), lost(coarse, rows)
    again = lost(coarse, refit(x, coarse, threshold, rows, x @ weight.T))
    assert exact < rounded and again < exact + 0.8 * (rounded - exact)


def test_rows_of_ranks_stay_in_eight_bits():
    model, report = compressed({"flops_reduction": 0.3, "method": "paper", "bits": 4})
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.model.layers[0].self_attn.q_proj.rows.dtype == torch.int8
    assert model.model.layers[0].mlp.up_proj.rows.dtype == torch.int8
    assert model.model.layers[0].mlp.B.dtype == model.model.layers[0].mlp.down_proj.rows.dtype == torch.uint8
    assert report.plan.bits == (4,)
