"""The benchmarks on tiny problems: timed code is correct, and noise does not look like a regression."""

import math
import random
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import rana_kernels
from bench import __main__ as command
from bench import cost, rounding, scale
from bench.cost import Decomposition, decompositions
from bench.kernels import baselines, check, compare, layers, quantized, stream, timing, weights
from bench.kernels.baselines import can_pack
from bench.kernels.cases import (
    COST_RATIO,
    MODELS,
    PUBLISHED,
    QUANTIZED,
    Linear,
    Lowrank,
    Mlp,
    NeuronMlp,
    Neurons,
    cases,
)
from bench.kernels.timing import interleave, measure, repeats
from bench.report import full
from bench.report.fits import fit
from bench.report.page import PAGE, page
from bench.report.results import RESULTS, ROOT, machine, read_csv, write_csv, write_json
from rana_kernels.allocation import curves
from rana_kernels.allocation.curves import block_curves
from rana_kernels.cli import bench as handover
from rana_kernels.model.architectures import find_blocks
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.system.cpu import cold_bytes

TINY = [
    Lowrank(64, 96, 32, 20, 1, "bf16"),
    Lowrank(64, 96, 32, 20, 4, "fp32"),
    Neurons(96, 64, 40, 1, "fp16"),
    Mlp(64, 96, 32, 20, 50, 2, "bf16"),
]
TINY_IN_BITS = [
    replace(case, bits=bits)
    for case in (
        Linear(128, 256, 2, "bf16"),
        Neurons(256, 128, 100, 1, "bf16"),
        Lowrank(128, 256, 64, 40, 1, "bf16"),
        NeuronMlp(128, 256, 80, 150, 1, "bf16"),
        Mlp(128, 256, 64, 40, 150, 2, "bf16"),
    )
    for bits in (16, 8, 4)
]  # torch's rivals need multiples of 128
every_tiny = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make copies and the buffer small, and compile nothing."""
    monkeypatch.setattr(weights, "cold_bytes", lambda: 2**16)
    monkeypatch.setattr(stream, "cold_bytes", lambda: 2**20)
    monkeypatch.setattr(timing, "PEAK_SIZE", 64)
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    for cached in (stream._buffer, timing.peak):
        cached.cache_clear()
    yield
    for cached in (stream._buffer, timing.peak):
        cached.cache_clear()


@every_tiny
def test_a_case_is_what_it_says(case):
    found = case.contenders()
    tolerance = {"bf16": 1e-2, "fp16": 1e-2, "fp32": 1e-5}[case.dtype]
    assert 0 < found.error() < tolerance
    shapes = {call().shape for call in found.calls.values()}
    assert len(shapes) == 1, shapes
    if case.M == 1:  # then the rows read are the live ones
        assert found.flops / found.bytes == 2 / weights.DTYPES[case.dtype].itemsize
    first, second = (found.calls["rana"]() for _ in range(2))
    assert not torch.equal(first, second), "the copies are one"


@pytest.mark.parametrize("case", TINY_IN_BITS, ids=lambda case: case.name)
def test_a_case_in_bits_is_what_it_says(case, monkeypatch):
    found = case.contenders()
    names = {"dense", "torch int8", "torch int4 g32", "torch int4 g128", "rana"}
    assert found.calls.keys() == names | ({"rana bf16"} if case.bits < 16 else set())
    assert 0 < found.error() < 1e-2
    assert len({call().shape for call in found.calls.values()}) == 1
    if case.M == 1:
        value = {16: 2, 8: 1 + 1 / 16, 4: 1 / 2 + 1 / 16}[case.bits]
        assert found.flops / found.bytes == pytest.approx(2 / value, rel=0.15)  # rounding moves a few scores
    if case.bits < 16:
        ours, floats = (found.calls[name]().float() for name in ("rana", "rana bf16"))
        assert (ours - floats).norm() / floats.norm() < {8: 0.3, 4: 0.6}[case.bits], (
            "one's weights are others"
        )


def test_rivals_compute_the_dense_product():
    x, shapes = torch.randn(3, 256).bfloat16(), [(128, 256)]
    weights._pool()
    torch.manual_seed(1)
    found = quantized.rivals(x, shapes, baselines.one_linear)
    torch.manual_seed(1)
    for name, call in found.items():  # each draws its weight in this order
        y, wanted = call().float(), x.float() @ weights.weight(128, 256, like=x).float().T
        assert (y - wanted).norm() / wanted.norm() < (0.02 if "int8" in name else 0.2)


def test_contenders_compute_the_same():
    """Packed products agree with plain ones."""
    x = torch.randn(4, 64).bfloat16()
    w = weights.weight(96, 64, like=x)
    if can_pack(torch.bfloat16):
        y = baselines.packed_linear(x, baselines.packed(w, 4))
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w))
    A, B = weights.weight(96, 32, like=x.float()), weights.weight(32, 64, like=x.float())
    if can_pack(torch.float32):
        y = baselines.packed_low_rank(x.float(), baselines.packed(B, 4), baselines.packed(A, 4))
        torch.testing.assert_close(y, x.float() @ B.T @ A.T)


compile_once = baselines.compiled  # the fixture replaces it


def test_compiled_is_compiled():
    torch._dynamo.utils.counters.clear()
    x, w = torch.randn(1, 8), torch.randn(4, 8)
    y = compile_once(torch.nn.functional.linear)(x, w)
    torch.testing.assert_close(y, x @ w.T)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_wrong_kernel_shows_as_an_error(monkeypatch):
    right = layers.ops.masked_lowrank_linear
    monkeypatch.setattr(layers.ops, "masked_lowrank_linear", lambda *args: 1.5 * right(*args))
    assert TINY[0].contenders().error() == pytest.approx(0.5, abs=0.02)


def test_measured_rows(tmp_path):
    rows = list(measure(TINY[:1], ["auto", "reference"], [1], 3))
    assert [row["backend"] for row in rows] == ["auto", "reference"]
    for row in rows:
        names = {"dense", "dense compiled", "static low rank", "masked in torch"}
        assert {"error", *(f"x {name}" for name in names)} <= row.keys()
        assert ("x dense packed" in row) == ("x static packed" in row) == can_pack(torch.bfloat16)
        assert row["p20"] <= row["us"] <= row["p80"]
    write_csv(tmp_path / "a.csv", "here", rows)
    stamp, again = read_csv(tmp_path / "a.csv")
    assert stamp == "here" and again == [{k: str(v) for k, v in row.items()} for row in rows]


def test_weights_go_round_in_more_than_the_largest_cache_holds(tmp_path):
    unknown = cold_bytes(tmp_path)
    assert unknown > 2**26
    for index, size in enumerate(("48K", "2048K", "307200K")):
        cache = tmp_path / f"devices/system/cpu/cpu0/cache/index{index}"
        cache.mkdir(parents=True)
        (cache / "size").write_text(f"{size}\n")
    assert cold_bytes(tmp_path) > 307200 * 1024 > unknown


def test_named_models_cost_what_is_asked():
    for name, model in MODELS.items():
        for linear, case in cases(model).items():
            assert case.cost_ratio == pytest.approx(COST_RATIO, abs=0.035), (name, linear)
    names = [case.name for case in (*PUBLISHED, *QUANTIZED)]
    assert len(set(names)) == len(names)


def test_quantized_cases_cost_what_is_asked():
    costs = {case.cost_ratio for case in QUANTIZED}
    assert all(min(abs(cost - asked) for asked in (1, 0.8, 0.7, 0.56)) < 0.01 for cost in costs)
    assert {case.bits for case in QUANTIZED} == {16, 8, 4}


def test_short_calls_are_timed_together():
    assert repeats(lambda: None) > 10
    torch.set_num_threads(1)
    found = interleave({"short": lambda: None, "long": lambda: sum(range(20000))}, 1, 3)
    assert found.times["short"].median < found.times["long"].median
    assert found.stream > 0


def test_red_tests_give_no_speed(monkeypatch):
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stdout=""))
    monkeypatch.setattr(command, "measure", lambda *a: pytest.fail("timed in spite of failing tests"))
    monkeypatch.setattr(command, "conditions", lambda: "here")
    assert invoke().exit_code == 1


@pytest.mark.parametrize("words", [["--model", "Llama-9"], ["--dtype", "int8"], ["--only", "nothing"]])
def test_options_that_are_not_understood(monkeypatch, words):
    monkeypatch.setattr(command, "require_green_tests", lambda: None)
    assert invoke(*words).exit_code == 2


def test_a_grid_is_measured_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "require_green_tests", lambda: None)
    words = ["--model", "demo model", "--density", "0.5", "--dtype", "fp32", "--only", "256->256"]
    result = invoke(
        *words, "--threads", "1", "--rounds", "3", "--csv", tmp_path / "a.csv", "--json", tmp_path / "a"
    )
    assert result.exit_code == 0, result.output
    stamp, rows = read_csv(tmp_path / "a.csv")
    assert stamp.startswith(machine()) and "revision" in stamp
    assert [row["case"] for row in rows] == ["lowrank 256->256 R=96 live=48 M=1 fp32"]


def test_quantized_cases_are_a_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "require_green_tests", lambda: None)
    monkeypatch.setattr(command, "QUANTIZED", TINY_IN_BITS[:6])
    words = (
        "--quantized",
        "--only",
        "neurons",
        "--threads",
        "1",
        "--rounds",
        "3",
        "--csv",
        tmp_path / "a.csv",
    )
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    _, rows = read_csv(tmp_path / "a.csv")
    assert [row["bits"] for row in rows] == ["16", "8", "4"]
    assert not rows[0]["x rana bf16"] and float(rows[2]["x rana bf16"]) > 0
    assert all(float(row["x torch int4 g32"]) > 0 for row in rows)


def invoke(*words: object):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(word) for word in words])


# --- the check against stored results ---

STORED = [{"case": case.name, "threads": "1", "x dense": "2.0", "% of stream": "80"} for case in TINY]


def timer(*repetitions: dict[str, tuple[float, float]]):
    """Return a fake timer. It plays (factor of x dense, factor of % of stream) by case, one dict a call."""
    turns = iter(repetitions)

    def time(some):
        factors = next(turns)
        return [
            {"case": c.name, "threads": 1, "x dense": 2.0 * a, "% of stream": 80 * b}
            for c in some
            for a, b in [factors.get(c.name, (1.0, 1.0))]
        ]

    return time


def test_what_stays_slower_is_found():
    name = TINY[1].name
    worse, unknown = check.slower(STORED, TINY, timer(*[{name: (0.7, 0.7)}] * 3))
    assert len(worse) == 1 and name in worse[0] and unknown == 0


@pytest.mark.parametrize(
    "repetitions",
    [
        [{TINY[1].name: (0.5, 0.5)}, {}],  # one bad moment
        [{TINY[1].name: (0.5, 0.5)}, {TINY[1].name: (0.7, 0.6)}, {}],
        [{TINY[1].name: (0.5, 1.0)}],  # another torch, whose dense layer is faster
        [{TINY[1].name: (1.1, 0.5)}],  # busy memory, which slows dense as much as ours
        [{case.name: (0.9, 0.9) for case in TINY}],  # within the margin
    ],
)
def test_noise_is_not_a_regression(repetitions):
    assert check.slower(STORED, TINY, timer(*repetitions))[0] == []


def test_random_noise_is_not_a_regression():
    draw = random.Random(0)
    for _ in range(200):
        played = [{c.name: (draw.gauss(1, 0.1), draw.gauss(1, 0.1)) for c in TINY} for _ in range(3)]
        assert check.slower(STORED, TINY, timer(*played))[0] == []


def test_only_suspects_are_timed_again():
    seen = []

    def time(some):
        seen.append([case.name for case in some])
        return timer({TINY[2].name: (0.5, 0.5)})(some)

    check.slower(STORED, TINY, time)
    assert seen == [[case.name for case in TINY], [TINY[2].name], [TINY[2].name]]


def test_the_check_says_what_it_cannot_compare(monkeypatch, tmp_path, capsys):
    console = Console(width=500)
    run = lambda path: check.against(path, TINY, [1], 3, console)  # noqa: E731
    assert run(tmp_path / "none.csv") == 0 and "missing" in capsys.readouterr().out
    write_csv(tmp_path / "other.csv", "another machine", STORED)
    assert run(tmp_path / "other.csv") == 0 and "not compared" in capsys.readouterr().out
    write_csv(tmp_path / "ours.csv", machine() + ", then", STORED[:3])
    for factor, code in ((0.5, 1), (1.0, 0)):
        factors = {case.name: (factor, factor) for case in TINY}
        monkeypatch.setattr(check, "measure", lambda some, *_, f=factors: timer(f)(some))
        assert run(tmp_path / "ours.csv") == code
        assert "1 of the measurements" in capsys.readouterr().out


# --- the comparison of revisions ---


def test_two_workers_take_turns():
    package, case = ROOT / "rana_kernels", Lowrank(2048, 4096, 512, 300, 1, "bf16")
    with compare.worker(package) as ours, compare.worker(package) as theirs:
        row = compare.row(case, 1, *compare.rounds_of(ours, theirs, case, 1, 5))
    assert row["p20"] <= row["x base"] <= row["p80"] and row["us"] > 0


def test_a_ratio_says_how_many_times_as_fast():
    row = compare.row(TINY[0], 1, [1e-5, 2e-5, 3e-5], [2e-5, 4e-5, 6e-5])
    assert (row["us"], row["base us"], row["x base"]) == (20.0, 40.0, 2.0)


def test_a_revision_that_is_not_there():
    with pytest.raises(ValueError, match="no-such-revision"), compare.checkout("no-such-revision"):
        pass


@pytest.mark.slow
def test_another_revision_is_built_and_removed():
    with compare.checkout("HEAD") as package:
        assert list(package.glob("_cpu_*.so"))
    assert not package.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert str(package.parent) not in listed


# --- growth and cost ---


def test_a_fit_finds_the_line_and_says_what_is_left():
    found = fit([{"constant": 1.0, "each": float(v)} for v in (1, 2, 3)], [5.0, 7.0, 9.0])
    assert found.coefficients == pytest.approx({"constant": 3.0, "each": 2.0})
    assert found.residuals == pytest.approx([0, 0, 0], abs=1e-12)
    bent = fit([{"each": float(v)} for v in (1, 2)], [1.0, 4.0])
    assert bent.residuals[0] < 0 < bent.residuals[1]
    with pytest.raises(ValueError, match="wanted as many"):
        fit([{"a": 1.0, "b": 2.0}], [1.0])


def test_no_work_takes_less_than_no_time():
    """Plain least squares would fit 1.2 · a - 0.1 · b here, with a negative coefficient."""
    features = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 4.1}, {"a": 4.0, "b": 7.9}]
    found = fit(features, [1.2 * f["a"] - 0.1 * f["b"] for f in features])
    assert found.coefficients["b"] == 0 and found.coefficients["a"] > 0
    draw = random.Random(0)
    for _ in range(20):
        true = [max(0.0, draw.gauss(0, 1)) for _ in "abc"]
        features = [{name: draw.random() for name in "abc"} for _ in range(8)]
        values = [sum(c * v for c, v in zip(true, f.values(), strict=True)) for f in features]
        if min(values) > 0:
            assert list(fit(features, values).coefficients.values()) == pytest.approx(true, abs=1e-9)


def test_a_sweep_covers_its_axes():
    with torch.inference_mode():
        found = scale.sweep(TINY[0], {"N": [64, 128, 256], "M": [1, 2]}, [1], 3)
    assert list(found) == ["base", "N, 1 thread", "M, 1 thread"]
    assert len(found["N, 1 thread"]["us"]) == len(found["N, 1 thread"]["residuals"]) == 3
    assert found["M, 1 thread"]["GB/s"] is None
    assert scale.marginal(TINY[0], "N", each=1 / 64) == round(2 * 20 * 64 / 1e3, 1)
    assert scale.marginal(TINY[0], "N", each=0.0) is None


@pytest.fixture(scope="module")
def compression() -> dict:
    linears = [Decomposition(48, 32, True), Decomposition(32, 48, False), Decomposition(96, 64, True)]
    return cost.cost(linears, [64, 128], 96)


def test_cost_is_measured_checked_and_extrapolated(compression):
    assert all(piece["seconds"] > 0 for piece in compression["linears"])
    assert all(block[step] > 0 for block in compression["blocks"] for step in cost.STEPS)
    for fitted in compression["fits"].values():
        assert min(fitted["coefficients"].values()) >= 0
    assert compression["check"]["measured"]["hidden"] == 96
    assert compression["check"]["estimated"].keys() == set(cost.STEPS)
    assert compression["estimates"].keys() == cost.ESTIMATED.keys()
    hours = compression["estimates"]["Llama-2-7B"]
    assert hours["all h"] == pytest.approx(sum(hours[f"{step} h"] for step in cost.STEPS), rel=0.01)
    assert hours["moment GB"] == float(f"{8 * 4096**2 / 1e9:.3g}")


def test_the_decompositions_counted_are_those_that_are_done(monkeypatch):
    """This holds if joint ranks are tried and taken for up and gate, and q, k and v, and nothing is dense."""
    monkeypatch.setattr(curves, "_has_best_ranks", lambda curve: True)
    shape, done = cost.block_shape(64), []
    model = cost.random_block(64)
    stats = rana_kernels.calibrate(model, [torch.randint(256, (2, 64))], progress=False)
    for block in find_blocks(model):
        worked = CalibratedBlock(model, block, stats)
        block_curves(worked)
        done += worked._factors
    by_input = find_blocks(model)[0].inputs
    counted = [(d.N, d.K) for d in decompositions(shape)]
    again = {names: sum(model.get_submodule(n).out_features for n in names) for names in by_input.values()}
    sizes = [sum(model.get_submodule(n).out_features for n in names) for names, _ in done]
    assert sorted([*sizes, *again.values()]) == sorted(N for N, _ in counted)


# --- rounding along the input or the output ---


def test_rounding_is_measured_along_both_sides():
    torch.manual_seed(0)
    model = cost.random_block(64)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = rounding.measure(model, torch.randint(256, (2, 64)))
    assert [(row["bits"], row["group"]) for row in rows[:4]] == [(8, 32), (8, 64), (8, 128), (8, "row")]
    for eight, four in zip(rows[:4], rows[4:], strict=True):
        for side in ("input", "output"):
            assert 0 < eight[side]["kl"] < four[side]["kl"]
            assert four[side]["equal"] <= eight[side]["equal"] <= 1
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert len(rounding.tabulated(rows).splitlines()) == 2 + len(rows)


def test_groups_lie_along_the_side_that_is_asked_for():
    weight = torch.randn(64, 32)
    weight[5] *= 1000  # one output: groups along the input keep the others from it
    along = {side: rounding.rounded(weight, 8, None, side) for side in ("input", "output")}
    error = {side: (found - weight)[:5].norm() for side, found in along.items()}
    assert error["input"] < 0.01 * error["output"]


def test_losses_are_of_the_dense_predictions():
    dense, other = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    found = rounding.losses(dense.log(), other.log())
    each = [0.75 * math.log(1.25) + 0.25 * math.log(0.625), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    assert found["equal"] == 0.5 and found["kl"] == pytest.approx(sum(each) / 2)


# --- what is published ---


def test_pages_are_what_their_generator_makes_of_the_results():
    assert PAGE.read_text() == page(RESULTS), "run python -m bench.report"
    assert len(PAGE.read_text().splitlines()) <= 220, "a page that people read"
    for path, text in full.pages(RESULTS).items():
        assert path.read_text() == text, "run python -m bench.report"
        assert f"(../bench/results/{path.name})" in PAGE.read_text()


def test_pages_show_every_kind_of_result(compression, tmp_path):
    speed = {"us": 1.5, "GB/s": 30.0}
    ratios = {"p20": 1, "p80": 2, "x dense": 0.9, "x static low rank": 0.8, "peak GFLOP/s": 100}
    write_csv(
        tmp_path / "a.csv",
        "a processor",
        [{"case": case.name, "threads": 1} | speed | ratios for case in PUBLISHED],
    )
    rivals = dict.fromkeys(("x rana bf16", "x torch int8", "x torch int4 g32", "x torch int4 g128"), 1.25)
    write_csv(
        tmp_path / "quantized-a.csv",
        "a processor in bits",
        [
            {"case": case.name, "cost_ratio": case.cost_ratio, "bits": case.bits, "threads": threads}
            | speed | ratios | rivals
            for case in QUANTIZED for threads in (1, 2)
        ],
    )  # fmt: skip
    problem = {"op": "masked_mlp", "model": "m", "density": 0.56, "M": 2, "dtype": "bf16", "MB": 1}
    times = {"dense us": 5.8, "rana cuda us": 7.25, "rana cuda x dense": 0.8, "peak GFLOP/s": 100}
    write_csv(tmp_path / "b.csv", "a card", [problem | times])
    setting = {"model": "m", "mode": "eager", "prompt": 32, "threads": 2, "batch": 8, "x dense, first": 0.95}
    speeds = {"dense": 10.0, "static": 20.0, "rana": 11.5}
    write_csv(
        tmp_path / "decode-m-a.csv",
        "a model",
        [setting | {"contender": name, "tokens/s": tokens} for name, tokens in speeds.items()],
    )
    kernels = scale.sweep(TINY[0], {"N": [64, 128, 256]}, [1], 3)
    write_json(tmp_path / "scale-a.json", "a machine", {"kernels": kernels})
    write_json(tmp_path / "cost-a.json", "a machine", compression)
    count = len(PUBLISHED)
    tokens = [sum(low <= case.M <= high for case in PUBLISHED) for low, high in ((1, 1), (2, 8), (9, 10**6))]
    expected = {
        "a.md": (
            "a processor",
            f"In {count} of {count} measurements",
            "| lowrank 4096->11008 R=2464 live=1377 M=8 fp32 | 1 | static low rank | 0.8 |",
            "| lowrank 4096->11008 R=2464 live=1377 M=8 fp32 | 1 | 1.5 | 30.0 | 1 | 2 | 0.9 | 0.8 | 100 |",
        ),
        "quantized-a.md": ("| x torch int4 g32 |",),
        "b.md": ("| masked_mlp | m | 0.56 |",),
        "decode-m-a.md": ("| m | eager | 32 | 2 | 8 | 0.95 | rana | 11.5 |",),
        "scale-a.md": ("| N, 1 thread | 64, 128, 256 |",),
        "cost-a.md": ("| Llama-3.1-405B |",),
        "performance.md": (
            "| Llama-2-7B up, fp32 | 1 | 1 | 1.5 |  | 0.90 | 0.80 |",
            "| dense" + "".join(f" | {n} of {n}, 0.90" for n in tokens) + " |",
            "| m, eager, 8 texts after 32 | 2 | 11.5 | 1.15 | 0.57 | 0.95 | a model |",
            "| whole models, static low rank |  | 1 of 1, 0.57 |  |",
            "| whole models, dense, first token |  | 1 of 1, 0.95 |  |",
            "| Llama-2-7B MLP, bf16 | 2 |  | 7.25 |  | 0.80 |",
            "| dense |  | 1 of 1, 0.80 |  |",
            "| linear 4096->11008 | 256 | 1.5 | 1.25 / 1.25 | 1.25 / 1.25 |",
            "| neuron mlp 4096x11008 | 1 | 1.5 | 1.25 / 1.25 | 1.25 / 1.25 |",
            ", [scale-a](../bench/results/scale-a.md)",
        ),
    }
    found = {path.name: text for path, text in full.pages(tmp_path).items()}
    found["performance.md"] = page(tmp_path)
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        for part in words:
            assert part in found[name], (name, part)


def test_a_plot_of_results_in_bits(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need the extra `plots`")
    from bench.report.plots import draw

    row = {"threads": 1, "us": 2.0, "x torch int8": 1.1, "x torch int4 g32": 1.2, "x torch int4 g128": 1.3}
    rows = [{"case": c.name, "cost_ratio": c.cost_ratio, "bits": c.bits} | row for c in QUANTIZED]
    write_csv(tmp_path / "quantized-a.csv", "a processor", rows)
    (made,) = draw(tmp_path, tmp_path)
    assert made.name == "quantized-a.png" and made.stat().st_size > 10_000


def test_rana_bench_hands_over(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(
        handover.runpy, "run_module", lambda name, **_: called.append((name, handover.sys.argv[1:]))
    )
    monkeypatch.setattr(handover.sys, "argv", [])
    for words in (["--only", "a"], ["scale", "--rounds", "3"], ["cost"]):
        handover.bench(SimpleNamespace(args=words))
    assert called == [("bench", ["--only", "a"]), ("bench.scale", ["--rounds", "3"]), ("bench.cost", [])]
    monkeypatch.setattr(rana_kernels, "__file__", str(tmp_path / "rana_kernels" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="checkout"):
        handover.bench(SimpleNamespace(args=[]))
