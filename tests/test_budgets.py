"""Budgets beside FLOPs: a cap on stored bytes, time by measured kernels, and requests that do not fit."""

import copy
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from rana_kernels.allocation.cost import MULTIPLY_ADDS, LinearCost, reduction
from rana_kernels.allocation.latency import LatencyTable, ShapeLatency, fit_cost, sizes_of
from rana_kernels.allocation.latency_measurement import measure_latency
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.whole_model import model_curves, plan_curves
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.model_card import write_card
from rana_kernels.cli import compress as command
from rana_kernels.model.architectures import find_blocks
from rana_kernels.model.plan import Plan
from tests.test_cli import compression, folder, run  # noqa: F401 - fixtures
from tests.test_compress import make_model, tokens
from tests.test_whole_model import DEMO_MODEL


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    """The checked-in model, statistics of a little text, and the curves that serve every budget."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).eval()
    text = load_file(DEMO_MODEL / "calibration.safetensors")["input_ids"][::30].long()
    stats = rana.calibrate(model, text.split(4), sample_tokens=512, progress=False)
    return SimpleNamespace(model=model, stats=stats, curves=model_curves(stats, progress=False))


def stored_in_blocks(model: torch.nn.Module) -> int:
    """Bytes in the state dict of all that is in the blocks but norms."""
    found = {n: t for n, t in model.state_dict().items() if ".layers." in n and "layernorm" not in n}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def made_of(
    model: torch.nn.Module, dtype: str = "float32", neuron: float = 1.0, call: float = 0.0
) -> LatencyTable:
    """Times as if the machine did a multiply-add in a nanosecond, of neuron adapters in `neuron` of them.

    call   the microseconds that every call takes besides
    """
    shapes = []
    for K, N in sizes_of(model, find_blocks(model)):
        ranks = tuple(
            (R, live, call + 1e-3 * (R * K + live * N)) for R, live in ((8.0, 8.0), (8.0, 2.0), (16.0, 4.0))
        )
        neurons = tuple((float(K), live, call + 1e-3 * neuron * live * N) for live in (4.0, 9.0))
        shapes.append(ShapeLatency(K, N, call + 1e-3 * K * N, ranks, neurons))
    return LatencyTable({"processor": "none", "dtype": dtype}, tuple(shapes))


# a cap on memory


@pytest.mark.parametrize("part", [0.7, 0.5])
def test_a_compressed_model_stores_what_it_may(demo, part):
    model, dense = copy.deepcopy(demo.model), stored_in_blocks(demo.model)
    request = Request("global", flops_reduction=0.44, max_memory=int(part * dense))
    free = plan_curves(demo.stats, demo.curves, replace(request, max_memory=None))
    assert sum(a.stored_bytes(2) for a in free.adapters) > part * dense  # the cap is felt
    capped = plan_curves(demo.stats, demo.curves, request)
    report = rana.compress(model, stats=replace(demo.stats, model=model), plan=capped, progress=False)
    assert report.block_bytes_before == dense
    assert report.block_bytes_after == stored_in_blocks(model) <= part * dense
    assert report.block_bytes_after == sum(a.stored_bytes(2) for a in report.plan.adapters)
    assert report.block_bytes_after > 0.99 * part * dense and report.plan.reduction >= 0.435
    assert attached_plan(model).max_memory == report.plan.max_memory == int(part * dense)
    shown = rf"most that these linears may store \| {part * dense / 1e6:.1f} MB"
    assert re.search(shown, write_card(model)) and "of the blocks' linears |" in write_card(model)


def test_a_cap_is_paid_for_in_loss(demo):
    """Less memory, more error: each cap loses more than the one before it."""
    dense, lost = stored_in_blocks(demo.model), []
    errors = {c.adapter: c.error for ways in demo.curves for way in ways for curve in way for c in curve}
    for part in (None, 0.7, 0.6, 0.5):
        cap = None if part is None else int(part * dense)
        made = plan_curves(demo.stats, demo.curves, Request("global", flops_reduction=0.44, max_memory=cap))
        lost.append(sum(errors[adapter] for adapter in made.adapters))
    assert lost == sorted(lost) and lost[-1] > 1.5 * lost[0]


def test_a_cap_out_of_reach_says_what_is_in_reach(demo):
    asked = {"flops_reduction": 0.2, "max_memory": 1000}
    with pytest.raises(
        ValueError, match=r"max_memory is 1000, wanted at least \d+ bytes with flops_red"
    ) as error:
        plan_curves(demo.stats, demo.curves, Request("global", **asked))
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    made = plan_curves(demo.stats, demo.curves, Request("global", 0.2, max_memory=least))
    assert sum(a.stored_bytes(2) for a in made.adapters) == least


@pytest.mark.parametrize("architecture", ["Qwen2", "OPT", "Phi3", "GPT2"])
def test_bytes_are_those_of_every_architecture(architecture):
    model = make_model(architecture)
    cap = round(0.8 * sum(p.numel() * 4 for b in find_blocks(model) for n in b.linears
                          for p in model.get_submodule(n).parameters()))  # fmt: skip
    report = rana.compress(model, [tokens()], flops_reduction=0.3, max_memory=cap, progress=False)
    assert report.block_bytes_after == sum(a.stored_bytes(4) for a in report.plan.adapters) <= cap


# time


def test_lines_go_through_their_points():
    points = [(R, live, 3 + 0.5 * R + 0.25 * live) for R in (16.0, 64.0) for live in (4.0, 9.0)]
    line = fit_cost(tuple(points))
    assert (line.fixed, line.stored, line.live) == pytest.approx((3, 0.5, 0.25))
    neurons = fit_cost(((64.0, 16.0, 5.0), (64.0, 32.0, 6.0), (64.0, 64.0, 8.0)))
    assert (neurons.fixed, neurons.stored, neurons.live) == pytest.approx((4, 0, 1 / 16))
    falling = fit_cost(((64.0, 16.0, 6.0), (64.0, 64.0, 5.0)))
    assert falling.live > 0 and falling.at(64, 16) == pytest.approx(5.5, rel=0.02)


def test_times_like_flops_give_the_plan_of_flops():
    stats = rana.calibrate(make_model(), [tokens()], progress=False)
    made = rana.plan(stats, time_reduction=0.4, times=made_of(stats.model), progress=False)
    like = rana.plan(stats, flops_reduction=0.4, progress=False)
    rounded = [
        [replace(a, live=round(a.live, 6), settings=()) for a in found.adapters] for found in (made, like)
    ]
    assert rounded[0] == rounded[1]
    assert made.time_reduction == 0.4 and made.flops_reduction is None
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("method", ["global", "rankadaptor"])
def test_what_takes_long_is_not_used(method):
    model = make_model()
    stats = rana.calibrate(model, [tokens()], progress=False)
    search = {"search": Search(tokens(2), 2)} if method == "rankadaptor" else {}
    kinds = {}
    for neuron in (0.2, 50.0):
        times = made_of(model, neuron=neuron)
        asked = {"time_reduction": 0.4, "times": times, "method": method, **search}
        made = rana.plan(stats, **asked, progress=False)
        assert reduction(times, made) == pytest.approx(0.4, abs=0.003)
        kinds[neuron] = [adapter.kind for adapter in made.adapters].count("neuron")
    assert kinds[0.2] > 2 and kinds[50.0] == 0
    report = rana.compress(model, stats=stats, **asked, progress=False)
    assert report.block_time_reduction == pytest.approx(0.4, abs=0.003)
    assert "| time saved there for one token" in write_card(model) and "(40.0% asked for)" in write_card(
        model
    )


def test_where_calls_take_long_neurons_are_joint():
    model = make_model()
    stats = rana.calibrate(model, [tokens()], progress=False)
    times = made_of(model, neuron=0.2, call=40.0)
    report = rana.compress(model, stats=stats, time_reduction=0.5, times=times, bits=16, progress=False)
    kinds = {(adapter.kind, len(adapter.names)) for adapter in report.plan.adapters}
    assert ("neuron", 3) in kinds and ("neuron", 2) in kinds
    assert reduction(times, report.plan) >= 0.49
    assert report.block_bytes_after == sum(a.stored_bytes(4) for a in report.plan.adapters)
    assert Plan.from_json(report.plan.to_json()) == report.plan


def test_measured_times_are_of_every_shape_and_survive_the_disk(tmp_path):
    model = make_model("Qwen2").bfloat16()
    times = measure_latency(model, progress=False)
    assert times.machine["dtype"] == "bfloat16" and times.machine["threads"] == torch.get_num_threads()
    assert [(s.in_features, s.width) for s in times.shapes] == sizes_of(model, find_blocks(model))
    block = find_blocks(model)[0]
    widths = [model.get_submodule(name).out_features for name in block.qkv]
    assert {(64, sum(widths)), *((64, N) for N in widths)} <= set(sizes_of(model, find_blocks(model)))
    times.require(model, find_blocks(model))
    for shape in times.shapes:
        full = min(shape.in_features, shape.width)
        assert shape.ranks[-1][:2] == (full, full) and shape.neurons[-1][:2] == (shape.in_features,) * 2
    times.save(tmp_path / "times.json")
    assert LatencyTable.load(tmp_path / "times.json") == times


def test_a_larger_linear_takes_longer():
    model = make_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=1)
    times = measure_latency(model, progress=False)
    small, large = times.rank(512, 2048), times.rank(512, 4096)  # up alone, and gate and up together
    assert large.at(512, 512) > 1.3 * small.at(512, 512) > 0
    assert large.at(512, 512) > 1.2 * large.at(512, 64)


DAMAGED = {
    "text": ("no times", "Expecting value"),
    "a format": ('{"format": 2}', "its format is 2, wanted 1"),
    "no shapes": ('{"format": 1, "machine": {}}', "'shapes'"),
    "a point": (
        '{"format": 1, "machine": {}, "shapes": [{"in_features": 8, "width": 8, "dense": 1.0, '
        '"ranks": [[1, 1]], "neurons": [[1, 1, 1]]}]}',
        "wanted .stored rows, live rows, µs. of both kinds",
    ),
    "no time": (
        '{"format": 1, "machine": {}, "shapes": [{"in_features": 8, "width": 8, "dense": -1.0, '
        '"ranks": [[1, 1, 1]], "neurons": [[1, 1, 1]]}]}',
        "wanted positive numbers",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_an_error(name, tmp_path):
    text, message = DAMAGED[name]
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match=f"times.json is no table of times .*{message}"):
        LatencyTable.load(tmp_path / "times.json")


# requests


def test_requests_that_do_not_fit():
    model = make_model()
    times = made_of(model)
    other = made_of(make_model(intermediate_size=192))
    for asked, message in [
        ({"flops_reduction": 0.4, "time_reduction": 0.4, "times": times}, "wanted exactly one of them"),
        ({"time_reduction": 0.4}, r"wanted both or neither: .*measure_latency\(model\)"),
        ({"flops_reduction": 0.4, "times": times}, "wanted both or neither"),
        (
            {"time_reduction": 1.5, "times": times},
            "time_reduction is 1.5, wanted more than 0 and less than 1",
        ),
        ({"time_reduction": 0.999, "times": times}, r"time_reduction is 0.999, wanted .* at most 0\.\d+"),
        ({"time_reduction": 0.4, "times": other}, "the times have no linear 64 -> 176"),
        (
            {"time_reduction": 0.4, "times": made_of(model, "bfloat16")},
            "are of bfloat16, the model is float32",
        ),
        ({"flops_reduction": 0.4, "max_memory": 0}, "max_memory is 0, wanted a positive number of bytes"),
        (
            {"flops_reduction": 0.4, "max_memory": 9, "method": "paper"},
            "want method 'global' or 'rankadaptor'",
        ),
        (
            {"time_reduction": 0.4, "times": times, "method": "static"},
            "want method 'global' or 'rankadaptor'",
        ),
        ({"plan": Plan(()), "max_memory": 9}, "a plan is given, and max_memory: wanted exactly one"),
        (
            {"plan": Plan(()), "search": Search(tokens(2), 2)},
            "a plan is given, and search: wanted exactly one",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            rana.compress(model, [tokens()], progress=False, **asked)
    assert all(type(model.get_submodule(n)) is torch.nn.Linear for b in find_blocks(model) for n in b.linears)


def test_a_table_of_another_dtype_is_refused_by_plan_too():
    stats = rana.calibrate(make_model(), [tokens()], progress=False)
    times = made_of(stats.model, "bfloat16")
    with pytest.raises(ValueError, match="the times are of bfloat16, the model is float32"):
        rana.plan(stats, time_reduction=0.4, times=times, progress=False)


def test_plans_without_the_new_fields_are_read():
    made = Plan((), "global", 0.3)
    fields = json.loads(made.to_json())
    del fields["time_reduction"], fields["max_memory"]
    assert Plan.from_json(json.dumps(fields)) == made
    for field, value in (("time_reduction", 2), ("max_memory", 1.5), ("max_memory", -1)):
        with pytest.raises(ValueError, match=f"Plan: {field} has {value}"):
            Plan.from_json(json.dumps({**fields, field: value}))


def test_prices_are_what_adapters_say_of_themselves(demo):
    for ways in demo.curves:
        for choice in (choice for way in ways for curve in way for choice in curve[::11]):
            assert choice.cost == pytest.approx(choice.adapter.flops / 2)
    assert MULTIPLY_ADDS.rank(3, 5) == LinearCost(0, 3, 5)


# the command line


def test_time_and_memory_on_the_command_line(folder, tmp_path, run, monkeypatch):  # noqa: F811
    table, measured = tmp_path / "tables" / "times.json", []

    def measure(model):
        measured.append(model)
        return made_of(model)

    monkeypatch.setattr(command, "measure_latency", measure)
    asked = ["--time-reduction", 0.3, "--times", table, "--max-memory", 0.25, "--json"]
    outs = [tmp_path / "once", tmp_path / "twice"]
    for out in outs:
        code, text, err = run(*compression(folder, out), *asked)
        assert code == 0, err
        found = json.loads(text)
        assert 0.299 <= found["block_time_reduction"] < 0.4
        assert found["block_bytes_after"] <= 250_000 < found["block_bytes_before"]
        assert found["plan"]["time_reduction"] == 0.3 and found["plan"]["flops_reduction"] is None
        assert found["plan"]["max_memory"] == 250_000
    assert len(measured) == 1 and LatencyTable.load(table).machine["processor"] == "none"
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    code, _, err = run(*compression(folder, tmp_path / "out"), "--time-reduction", 0.3)
    assert code == 1 and "wanted both or neither" in err
