"""Quantisation: packing by the documented layout, and rounding whose error is as small as promised."""

import pytest
import torch

from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization import pack_int4, quantize, unpack_int4
from tests.cases import naive_pack, spread

GROUPS = (32, 64, 128, None)
every_group = pytest.mark.parametrize("group", GROUPS)
every_width = pytest.mark.parametrize("bits", [8, 4])
every_orientation = pytest.mark.parametrize("along", ["columns", "rows"])


@pytest.mark.parametrize("columns", [1, 2, 7, 31, 32, 33, 48, 63, 64, 66, 100, 129, 0])
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_packing_follows_the_layout_and_comes_back(rows, columns):
    q = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and torch.equal(packed, naive_pack(q))
    assert torch.equal(unpack_int4(packed, columns), q)
    if columns % 2 == 0:
        assert torch.equal(unpack_int4(packed), q)


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.int8), torch.full((1, 2), 8)]
)
def test_packing_refuses_what_it_cannot_hold(values):
    with pytest.raises(ValueError, match="pack_int4: values"):
        pack_int4(values if values.dtype != torch.int64 else values.to(torch.int8))


def rounded(weight: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight after rounding, and the step of each of its values."""
    q, scale = quantize(weight, *arguments, **options)
    assert scale.dtype == torch.float16 and scale.isfinite().all()
    return dequantize(q, scale, weight.shape[1]), spread(scale, weight.shape[1])


def correlated(size: int, rank: int | None = None) -> torch.Tensor:
    """A second moment of inputs of many sizes that depend on one another."""
    x = torch.randn(3 * size, rank or size) @ torch.randn(rank or size, size)
    x *= torch.logspace(0, -1.5, size)[torch.randperm(size)]
    return x.double().T @ x.double()


def weighted_error(error: torch.Tensor, moment: torch.Tensor, along: str) -> float:
    error = error.double() if along == "columns" else error.double().T
    return float(torch.trace(error @ moment @ error.T))


@every_group
@pytest.mark.parametrize("shape", [(5, 70), (3, 256), (4, 33), (1, 1)])
def test_eight_bits_are_within_half_a_step(shape, group):
    weight = torch.randn(shape)
    found, steps = rounded(weight, 8, group)
    assert ((found - weight).abs() <= 0.501 * steps).all()
    assert (steps <= 1.001 * weight.abs().max() / 127).all()


@every_group
def test_four_bits_err_less_than_with_the_largest_value_at_seven(group):
    weight = torch.randn(64, 256)
    found, steps = rounded(weight, 4, group)
    inside = (found != -8 * steps) & (found != 7 * steps)
    assert ((found - weight).abs() <= 0.501 * steps.abs())[inside].all()
    size = group or 256
    step = weight.unflatten(1, (-1, size)).abs().amax(-1) / 7
    plain = (weight / spread(step.half(), 256)).round() * spread(step.half(), 256)
    assert (found - weight).square().sum() < 0.9 * (plain - weight).square().sum()


@every_width
@every_group
@pytest.mark.parametrize("columns", [64, 70, 33])
def test_weights_that_can_be_represented_stay_exact(columns, group, bits):
    top = 127 if bits == 8 else 7
    q = torch.randint(-top, top + 1, (6, columns)).float()
    size = group or columns
    q[:, ::size] = top  # every group has its largest value
    steps = torch.rand(6, -(-columns // size)).add(0.5).half()
    weight = q * spread(steps, columns)
    assert torch.equal(rounded(weight, bits, group)[0], weight)


@every_width
@every_group
@every_orientation
def test_gptq_errs_less_where_inputs_are_correlated(along, group, bits):
    weight = torch.randn(160, 192) * 0.02
    moment = correlated(192 if along == "columns" else 160)
    nearest, _ = rounded(weight, bits, group)
    spread_out, _ = rounded(weight, bits, group, moment, along=along)
    errors = [weighted_error(found - weight, moment, along) for found in (spread_out, nearest)]
    assert errors[0] < 0.7 * errors[1]


@every_orientation
def test_gptq_serves_moments_of_fewer_tokens_than_inputs(along):
    weight, moment = torch.randn(96, 96), correlated(96, rank=20)
    errors = [
        weighted_error(rounded(weight, 4, 32, m, along=along)[0] - weight, moment, along)
        for m in (moment, None)
    ]
    assert errors[0] < 0.2 * errors[1]


@every_width
@every_group
@every_orientation
def test_a_diagonal_moment_rounds_to_nearest(along, group, bits):
    weight = torch.randn(48, 80)
    moment = torch.eye(80 if along == "columns" else 48) * 3
    for found, wanted in zip(
        quantize(weight, bits, group, moment, along=along), quantize(weight, bits, group), strict=True
    ):
        assert torch.equal(found, wanted)


@every_width
@every_group
def test_rows_and_columns_of_zeros_stay_zero(group, bits):
    weight = torch.randn(20, 70)
    weight[3] = 0
    weight[:, 5] = 0
    moment = correlated(70)
    moment[7] = moment[:, 7] = 0
    for options in ({}, {"moment": moment}, {"moment": correlated(20), "along": "rows"}):
        found, _ = rounded(weight, bits, group, **options)
        assert found.isfinite().all() and (found - weight).abs().max() < 3
        assert (found[3] == 0).all() or options.get("along") == "rows"
    assert (rounded(torch.zeros(4, 70), bits, group, torch.zeros(70, 70))[0] == 0).all()


@every_width
def test_empty_weights_are_rounded(bits):
    for shape in ((0, 8), (8, 0)):
        q, scale = quantize(torch.zeros(shape), bits, 32)
        assert dequantize(q, scale, shape[1]).shape == shape


def test_small_steps_do_not_vanish():
    weight = torch.randn(4, 64) * 1e-3
    weight[0] *= 1e-3
    for bits in (8, 4):
        found, steps = rounded(weight, bits, 32)
        assert ((found - weight).abs() <= (0.501 if bits == 8 else 2) * steps.abs()).all()
        assert (steps != 0).all()


def test_a_large_weight_is_rounded_in_parts_to_the_same_values(monkeypatch):
    weight = torch.randn(37, 130)
    wanted = quantize(weight, 4, 32)
    for module in ("steps", "rounding"):
        monkeypatch.setattr(f"rana_kernels.quantization.{module}.CHUNK", 700)
    for found, whole in zip(quantize(weight, 4, 32), wanted, strict=True):
        assert torch.equal(found, whole)


W, M = torch.ones(4, 8), torch.eye(8)
REFUSED = {
    "nan": ((W * float("nan"), 4), "weight holds values that are not finite"),
    "inf": ((W * float("inf"), 8), "weight holds values that are not finite"),
    "moment": ((W, 8, 32, M * float("nan")), "moment holds values that are not finite"),
    "integers": ((W.to(torch.int8), 8), "weight is torch.int8"),
    "vector": ((W[0], 8), "wanted floats"),
    "bits": ((W, 5), "bits is 5, wanted 8, 4 or 3"),
    "group": ((W, 4, 48), "group is 48, wanted 32, 64, 128, or None for a whole row"),
    "shape": ((W, 4, 32, torch.eye(4)), r"moment has shape \[4, 4\], wanted \[8, 8\] for the columns"),
    "negative": ((W, 4, 32, -M), "not positive semi-definite"),
    "tiny": ((W * 1e-9, 8), "the largest value of weight is 1e-09, wanted .* multiply the weight by a power"),
    "huge": ((W * 1e9, 4), "the largest value of weight is 1e.09"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rounded_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)


def test_an_unknown_orientation_is_refused():
    with pytest.raises(ValueError, match="along is 'diagonal', wanted 'rows' or 'columns'"):
        quantize(W, 4, along="diagonal")
