"""The benchmark of a card, on tiny problems in Triton's interpreter, with made-up times."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu import __main__ as command
from bench.gpu import limits, tests
from bench.gpu import stages as stages_module
from bench.gpu.stages import Stages
from bench.kernels.quantized import int4_for_card, int4_on_card
from bench.report.results import read_csv, write_csv
from rana_kernels import ops
from rana_kernels.backends import triton
from tests.subprocesses import python

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
from pathlib import Path
import torch
from bench.gpu import ops
from bench.kernels.cases import Model
from bench.report import results

ops.DEVICE, ops.DTYPES["bf16"] = "cpu", torch.float32
ops.MODELS = {"tiny": Model(hidden=32, queries=32, keys=32, neurons=64, blocks=1)}
ops.DENSITIES = (1.0, 0.5)
ops.cache_bytes = lambda: 1
results.card = lambda: "no-card"
def calls_all(contenders, rounds=15):
    results = {name: [call() for call in calls] for name, calls in contenders.items()}
    shapes = {y.shape for ys in results.values() for y in ys}
    assert len(shapes) == 1, shapes
    assert all(len(ys) > 1 for ys in results.values()), "weights are not rotated"
    close = [n for n in results if n != "dense" and n != "static"]
    for name in close[1:]:
        torch.testing.assert_close(results[name][0], results[close[0]][0], rtol=1e-4, atol=1e-4)
    return {name: [1e-6 * (1 + i) for i in range(rounds)] for name in contenders}
ops.replay_seconds = calls_all
ops.bandwidths, ops.peak = lambda: (100.0, 90.0), lambda dtype: 1000.0
red = ["cuda:" + op for op in ("masked_linear", "masked_lowrank_linear", "masked_mlp")]
ops.main(Path(sys.argv[1]), ["tiny"], [1, 5, 80], "bf16", red, None)
"""


@pytest.mark.skipif(not triton.available(), reason="the triton package is not installed")
def test_every_problem_is_measured(tmp_path):
    path = tmp_path / "no-card.csv"
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, path],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "RANA_REVISION": "mine"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    assert child.stdout.count("dense 8.0 us; rana triton 8.0 us, 1.0 x dense") == 3 * 2 * 3
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# no-card, served by") and lines[0].endswith("revision mine")
    rows = list(csv.DictReader(lines[1:]))
    assert len(rows) == 3 * 2 * 3, "three ops, two densities, three numbers of tokens"
    for row in rows:
        assert float(row["rana triton us"]) == float(row["dense us"]) == 8.0
        assert "rana cuda us" not in row, "red, and timed"
        # MB in 8 µs, in percent of 100 GB/s
        assert float(row["rana triton % of copy"]) == pytest.approx(125 * float(row["MB"]), abs=0.2), row


IN_BITS = """
import sys
from pathlib import Path
import torch
from bench.gpu import bits, ops
from bench.kernels.cases import Model
from bench.report import results

ops.DEVICE = "cpu"
ops.MODELS = {"tiny": Model(hidden=128, queries=128, keys=128, neurons=256, blocks=1)}
ops.BACKENDS = ("reference",)
ops.cache_bytes = lambda: 1
results.card = lambda: "no-card"
def calls_all(contenders, rounds=15):
    results = {name: [call() for call in calls] for name, calls in contenders.items()}
    assert len({y.shape for ys in results.values() for y in ys}) == 1
    assert all(len(ys) > 1 and torch.equal(ys[0], ys[1]) for name, ys in results.items() if name != "dense")
    return {name: [1e-6 * (1 + i) for i in range(rounds)] for name in contenders}
ops.replay_seconds = calls_all
ops.bandwidths = lambda: (100.0, 90.0)
bits.backends.installed = lambda name: True
bits.main(Path(sys.argv[1]), ["tiny"], [1, 5], ["reference:masked_mlp"])
"""


def test_every_width_is_measured(tmp_path):
    path = tmp_path / "no-card-bits.csv"
    child = python("-c", IN_BITS, str(path))
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    _, rows = read_csv(path)
    assert [row["bits"] for row in rows] == ["8", "4", *["8", "4"] * 3] * 2, "a linear and three masked ops"
    for row in rows:
        timed = row["op"] != "masked_mlp"
        assert (row["rana reference us"] == "8.0") == timed and row["dense us"] == "8.0"
        if timed:  # MB in 8 µs, in percent of 100 GB/s
            assert float(row["rana reference % of copy"]) == pytest.approx(125 * float(row["MB"]), abs=0.2)
    by_bits = {(row["op"], row["bits"]): float(row["MB"]) for row in rows if row["M"] == "1"}
    assert by_bits["linear", "8"] == pytest.approx(128 * 256 * 1.0625e-6, abs=1e-3)
    assert by_bits["linear", "4"] == pytest.approx(128 * 256 * 0.5625e-6, abs=1e-3)


@pytest.mark.parametrize("group", [32, 128])
def test_torch_takes_our_weights_in_4_bits(group):
    """On no device: the op checks shapes and types, and its meaning is that of the layout we pack."""
    with FakeTensorMode():
        packed, scales = int4_for_card(torch.empty(64, 256, dtype=torch.bfloat16), group)
        y = int4_on_card(group, torch.empty(3, 256, dtype=torch.bfloat16), packed, scales)
    assert y.shape == (3, 64) and y.dtype == torch.bfloat16
    assert packed.shape == (8, 2, 32, 4) and scales.shape == (256 // group, 64, 2)


def say(text: str, then: str = "") -> list[str]:
    return [sys.executable, "-c", f"print({text!r}, flush=True); {then}"]


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["a terminal", "the background"])
def shell(request):
    """Run the command as in a terminal, or as in the background, where interrupts are ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("shell")
def test_a_stage_outlives_what_fails_and_what_hangs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages_module, "LAST_WORDS", 2)
    monkeypatch.setattr(stages_module, "SHORTEST", 2)
    stages = Stages(tmp_path / "log", time.monotonic() + 60)
    commands = {
        "good": say("fine"),
        "bad": say("oh", "raise SystemExit(3)"),
        "slow": say("before", "import time; time.sleep(1000)"),
        "hung": say("deaf", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(1000)"),
    }
    assert stages.run("first", commands, limit=3) == ["bad", "slow", "hung"]
    assert stages.red == ["first, bad", "first, slow", "first, hung"]
    assert stages.run("second", {"good": say("again")}, limit=30) == []
    stages.ends = time.monotonic()
    assert stages.run("third", {"late": say("never")}, limit=30) == ["late"]
    log = (tmp_path / "log").read_text()
    for words in ("good: done\nfine", "bad: FAILED with 3\noh", "slow: FAILED: out of time\nbefore", "again"):
        assert words in log
    assert "KeyboardInterrupt" in log and "hung: FAILED: out of time\ndeaf\n===" in log
    assert "third: left out" in log and "never" not in log and log in capsys.readouterr().out


def test_a_later_call_goes_on(tmp_path, monkeypatch):
    """What is done is not run again; what was late or left out is."""
    monkeypatch.setattr(stages_module, "SHORTEST", 2)
    log, record = tmp_path / "log", tmp_path / "done.json"

    def call(stamp: str = "mine", seconds: float = 60) -> Stages:
        stages = Stages(log, time.monotonic() + seconds, record, stamp)
        assert stages.run("first", {"good": say("once")}, limit=30) == []
        assert stages.run("second", {"bad": say("oh", "raise SystemExit(3)")}, limit=30) == ["bad"]
        hang = "" if "second call" in log.read_text() else "import time; time.sleep(1000)"
        stages.run("third", {"slow": say("thrice", hang)}, limit=3)
        return stages

    stages = call()
    assert stages.missing == ["third"] and stages.red == ["second, bad", "third, slow"]
    stages.end()
    assert "not done: third" in log.read_text()
    stages.say("second call")
    stages = call()
    assert stages.red == ["second, bad"] and not stages.missing
    text = log.read_text()
    assert text.count("\nonce\n") == text.count("\noh\n") == 1 and "first: done by an earlier call" in text
    assert stages_module.done_before(record, "mine") == {"first": [], "second": ["bad"], "third": []}
    assert not stages_module.done_before(record, "another card"), "of another run"
    stages.end()
    assert not record.exists(), "the next call begins anew"


def test_green_gates_are_not_repeated(tmp_path, monkeypatch):
    record = tmp_path / "done.json"
    monkeypatch.setattr(tests, "RECORD", record)
    monkeypatch.setattr(tests, "conditions", lambda device: "a card")
    monkeypatch.setattr(tests, "gates", lambda: {"cuda:linear": say("run", "raise SystemExit(1)")})
    for stamp, failed, green in (("a card", [], True), ("a card", ["x"], False), ("another", [], False)):
        record.write_text(json.dumps({"stamp": stamp, "done": {tests.GATES_STAGE: failed}}))
        with nullcontext() if green else pytest.raises(typer.Exit):
            tests.require_green_gates()


TUNED = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig
from bench.decode.models import SHAPES
from bench.gpu import tune
from rana_kernels.backends.triton import configurations

tune.DEVICE, tune.TOKENS = "cpu", (1, 2)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
SHAPES["tiny"] = LlamaConfig(**sizes)
configurations.gpu_name = lambda device: "no-card"
tune.microseconds = lambda calls: float(len(calls))
tune.main(Path(sys.argv[1]), "tiny")
"""


@pytest.mark.skipif(not triton.available(), reason="the triton package is not installed")
def test_a_table_of_configurations_is_written(tmp_path):
    path = tmp_path / "no-card-triton.json"
    child = python("-c", TUNED, str(path))
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["card"] == "no-card"
    kinds = {(key.split()[0], key.split()[-1]) for key in found["configurations"]}
    assert {("masked_mlp", "uint8"), ("masked_linear", "int8"), ("masked_linear", "bytes2")} <= kinds


def test_a_log_names_files_from_the_project_on(tmp_path):
    stages = Stages(tmp_path / "log", time.monotonic() + 60)
    stages.say(f'File "{ROOT}/tests/test_gpu.py", line 1')
    assert (tmp_path / "log").read_text() == 'File "tests/test_gpu.py", line 1\n'


class Rehearsal(Stages):
    """Runs nothing, makes up the times, and lets one op fail."""

    def run(self, stage, commands, limit):
        played.append((stage, commands))
        for words in commands.values():
            if "bench.gpu.ops" in words:
                write_csv(Path(words[3]), "a card", [{"op": stage, "us": 1}])
        return ["cuda:masked_mlp"] if "cuda:masked_mlp" in commands else []


played: list[tuple[str, dict]] = []


def test_stages_come_in_the_order_of_their_worth(monkeypatch, tmp_path):
    monkeypatch.setattr(tests, "served", lambda: ["cuda"])
    monkeypatch.setattr(command, "card", lambda: "no-card")
    monkeypatch.setattr(command, "PARTS", tmp_path)
    played.clear()
    command.run(Rehearsal(tmp_path / "log", time.monotonic()), "", "bf16", tmp_path, tmp_path / "out")
    stages = [stage for stage, _ in played]
    assert stages == [
        "limits", tests.GATES_STAGE, "times of one token", "times in 8 and 4 bits", "whole steps in 4 bits",
        "times of several tokens", "times in float16", "sanitizer", "configurations", "all tests",
        "times of other models",
    ]  # fmt: skip
    timed = [commands["times"] for _, commands in played if "times" in commands]
    assert len(timed) == 4 and all(words[-4:-2] == ["--red", "cuda:masked_mlp"] for words in timed)
    stamp, rows = read_csv(tmp_path / "out" / "no-card.csv")
    of_ops = [stage for stage, commands in played if "times" in commands]
    assert stamp == "a card" and [row["op"] for row in rows] == of_ops
    # the command lines are understood, and fail later, because there is no card
    in_bits = next(commands["times in bits"] for _, commands in played if "times in bits" in commands)
    assert in_bits[-2:] == ["--red", "cuda:masked_mlp"]
    for words in (timed[0], in_bits):
        child = python(*words[1:])
        assert child.returncode == 1 and "Usage" not in child.stderr, child.stderr


COLLECT = """
import json, sys
import pytest
for arguments in json.loads(sys.argv[1]):
    print("BEGIN", flush=True)
    assert pytest.main([*arguments, "--collect-only"]) == 0, arguments
"""


def selected(*commands: list[str]) -> list[str]:
    """Return the tests that each command of pytest would run. One process lists them all."""
    assert all(words[:3] == [sys.executable, "-m", "pytest"] for words in commands)
    child = python("-c", COLLECT, json.dumps([words[3:] for words in commands]))
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout.split("BEGIN\n")[1:]


def test_the_tests_of_a_card_are_found(monkeypatch):
    """Without a card, look for the names of the same tests on the CPU."""
    monkeypatch.setattr(tests, "served", lambda: ["cuda", "triton"])
    monkeypatch.setattr(tests, "IMPLEMENTATIONS", {"cuda": "registered", "triton": "reference"})
    gates, everything, sanitizers = tests.gates(), tests.everything(), tests.sanitizer()
    assert set(gates) == {f"{backend}:{op}" for backend in ("cuda", "triton") for op in ops.SCHEMAS}
    assert {"cuda on the card", "cuda, the ops"} < set(everything)
    gate, raced, whole, *thirds = selected(
        [word.replace("gpu and ", "") for word in gates["cuda:linear"]],
        sanitizers["cuda, racecheck"],
        everything["cuda on the card"],
        *(everything[f"triton on the card, {third}"] for third in tests.THIRDS),
    )
    assert len(re.findall(r"\[registered-linear-M", gate)) == gate.count("[") > 50, "masked_linear too"
    assert "test_integers_are_exact" in gate and "test_gaussians_are_close" in gate
    names = [name for part in thirds for name in re.findall(r"^tests/.*$", part, re.MULTILINE)]
    whole = whole.replace("[cuda", "[triton")
    assert sorted(names) == sorted(re.findall(r"^tests/.*$", whole, re.MULTILINE)), "each in one part"
    assert "test_two_streams_at_once[triton-" in thirds[0] and not any("sanitizer" in part for part in thirds)
    assert "test_compute_sanitizer[cuda-racecheck]" in raced


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_limits_compile(tmp_path, capability):
    program = limits.compiled(tmp_path / "limits", capability)
    assert program.exists()
