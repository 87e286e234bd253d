"""What only a card can show: graphs, streams, determinism, no waiting for the host, memory errors.

That the ops are exact and close there is tested where it is for the CPU, in tests/test_ops.py.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rana_kernels
from rana_kernels import backends
from tests.cases import FORMS, QUANTIZED_FORMS, Case, assert_close, input_of, make_inputs
from tests.subprocesses import python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parent.parent
TOKENS = (1, 5, 40, 200)
# large enough for every program of a grid to have work, and to meet the others at its barriers
LARGE = {
    "masked_linear": Case("masked_linear", R=4096, N=2048),
    "masked_lowrank_linear": Case("masked_lowrank_linear", R=816, N=5632, K=2048),
    "masked_mlp": Case("masked_mlp", R=816, N=2048, K=2048, I=5632, gate=800),
    "masked_mlp_without_B": Case("masked_mlp", R=None, N=2048, K=2048, I=5632, gate="joint"),
    "linear": Case("linear", N=5632, K=2048),
}
LARGE |= {
    "masked_lowrank_linear_mixed": replace(LARGE["masked_lowrank_linear"], bits=(8, 4)),
    "masked_mlp_without_B_int4": replace(LARGE["masked_mlp_without_B"], bits=(4,)),
}
# quantised rows that are whole packets of 16 bytes, beside those of the forms, which are not
PACKETS = {
    "lowrank_packets": Case("masked_lowrank_linear", R=75, N=160, K=1088, bits=(4, 8), group=64),
    "mlp_packets": Case("masked_mlp", R=48, N=96, K=64, I=544, gate=20, bits=(8, 4, 4, 8)),
    "mlp_without_B_packets": Case(
        "masked_mlp", R=None, N=96, K=96, I=320, gate="joint", bits=(4,), group=128
    ),
    "linear_packets": Case("masked_linear", R=601, N=320, bits=(4,)),
    "dense_packets": Case("linear", N=150, K=1088, bits=(4,), group=0),
}
ALL_FORMS = FORMS | QUANTIZED_FORMS | PACKETS
every_form = pytest.mark.parametrize("case", ALL_FORMS.values(), ids=ALL_FORMS)
every_large = pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
every_m = pytest.mark.parametrize("M", TOKENS)


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request):
    """Each backend that is installed for CUDA tensors, in turn."""
    if not backends.installed(request.param):
        pytest.skip(f"the {request.param} backend is not installed")
    with rana_kernels.use_backend(request.param):
        yield request.param


def prepared(case: Case, M: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Callable, dict]:
    """(a call that takes no arguments, the arguments it reads): run once, so compiled."""
    args = make_inputs(replace(case, lead=(M,)), dtype, device="cuda")
    op = getattr(torch.ops.rana, case.op).default
    op(*args.values())
    torch.cuda.synchronize()
    return lambda: op(*args.values()), args


def captured(call: Callable) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


@every_m
@every_form
def test_a_graph_replays_on_changed_inputs(case, M):
    call, args = prepared(case, M)
    graph, y = captured(call)
    thresholds = [n for n in ("threshold", "down_threshold") if n in args]
    for factor in (1.0, -0.5, 2.0):
        args[input_of(args)].mul_(factor)
        for name in thresholds:
            args[name].mul_(0.9)
        graph.replay()
        assert torch.equal(y, call())


@every_m
@every_large
def test_a_side_stream(case, M):
    call, args = prepared(case, M)
    wanted = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [call() for _ in range(5)]
    stream.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


@pytest.mark.parametrize("priorities", [(0, 0), (0, -1)], ids=["equals", "one before the other"])
@pytest.mark.parametrize("M", [1, 5])
@every_large
def test_two_streams_at_once(case, M, priorities):
    """Launches in flight together must not share the state of a barrier, or scratch memory."""
    call, _ = prepared(case, M)
    wanted = call()
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(priority=priority) for priority in priorities], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


@pytest.mark.parametrize("M", [1, 5])
@every_large
def test_two_graphs_at_once(case, M):
    call, _ = prepared(case, M)
    wanted = call()
    graphs = [captured(call) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for _, y in graphs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@every_m
@every_large
def test_the_same_bits_every_time(case, M, dtype):
    call, _ = prepared(case, M, dtype)
    wanted = call()
    assert all(torch.equal(call(), wanted) for _ in range(100))


@every_m
@every_large
def test_large_problems_are_close(case, M):
    args = make_inputs(replace(case, lead=(M,)), torch.bfloat16, device="cuda")
    assert_close(getattr(torch.ops.rana, case.op).default(*args.values()), case.op, args, torch.bfloat16)


@every_m
@every_form
def test_nothing_waits_for_the_card(case, M):
    call, _ = prepared(case, M)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_form
def test_compiled_with_graphs(case):
    torch._dynamo.reset()  # every case is the same code object, which is compiled for a few only
    call, args = prepared(case, 1)
    op = getattr(torch.ops.rana, case.op).default
    step = torch.compile(lambda *a: op(*a) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(step(*args.values()), call() * 2)


COMPILED_FIRST = """
import torch, rana_kernels
from tests.cases import SMALL, make_inputs
args = make_inputs(SMALL["masked_lowrank_linear"], torch.bfloat16, device="cuda")
op = torch.ops.rana.masked_lowrank_linear.default
with rana_kernels.use_backend("{backend}"):
    step = torch.compile(lambda *a: op(*a) * 2, fullgraph=True, mode="reduce-overhead")
    results = [step(*args.values()).clone() for _ in range(3)]
    assert all(torch.equal(y, op(*args.values()) * 2) for y in results)
"""


def test_the_first_call_of_a_process_is_compiled_with_graphs(backend):
    """What a backend keeps for later calls must not be memory of the graph that torch warms up for."""
    child = python("-c", COMPILED_FIRST.format(backend=backend))
    assert child.returncode == 0, child.stderr[-4000:]


@every_form
def test_a_second_device(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    call, args = prepared(case, 1)
    there = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in args.values()]
    y = getattr(torch.ops.rana, case.op).default(*there)
    assert y.device.index == 1 and torch.equal(y.cpu(), call().cpu())


SANITIZED = """
import torch, rana_kernels
from dataclasses import replace
from tests.cases import FORMS, QUANTIZED_FORMS, SMALL, make_inputs
from tests.test_gpu import PACKETS
others = FORMS["mlp_without_B"], QUANTIZED_FORMS["lowrank_mixed"], *PACKETS.values()
with rana_kernels.use_backend("{backend}"):
    for case in (*SMALL.values(), *others):
        for M in (1, 5, 40, 100):
            args = make_inputs(replace(case, lead=(M,)), torch.bfloat16, device="cuda")
            getattr(torch.ops.rana, case.op).default(*args.values())
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(backend, tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("no compute-sanitizer")
    child = subprocess.run(
        [
            sanitizer,
            f"--tool={tool}",
            "--report-api-errors=no",
            "--error-exitcode=9",
            sys.executable,
            "-c",
            SANITIZED.format(backend=backend),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    if "Device not supported" in child.stdout:
        pytest.skip("compute-sanitizer knows no way to this device")
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
