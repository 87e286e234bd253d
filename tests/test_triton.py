"""The Triton backend where no card is: interpreted, compiled for cards, and how problems are cut up."""

import json
import re
from functools import partial
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch

from rana_kernels import backends, ops
from rana_kernels.backends import triton as backend
from tests.subprocesses import pytest_passes, python

pytestmark = pytest.mark.skipif(not backend.available(), reason="the triton package is not installed")


# Who serves


def test_importing_the_package_does_not_import_triton():
    child = python("-c", "import rana_kernels, sys; assert 'triton' not in sys.modules, 'imported'")
    assert child.returncode == 0, child.stderr


def test_the_package_works_without_triton():
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else real(name, package)
import rana_kernels
from rana_kernels import backends
assert 'triton' not in {s for served in backends.serving().values() for s in served.values()}
try: rana_kernels.use_backend('triton')
except RuntimeError as error: print(error)
"""
    child = python("-c", code)
    assert child.returncode == 0 and "pip install triton" in child.stdout, child.stderr


def test_triton_serves_cuda_where_no_compiled_library_does():
    served = {s["cuda"] for s in backends.serving().values()}
    assert served == {"cuda" if backends.library("cuda").exists() else "triton"}


def test_triton_leaves_the_cpu_alone_unless_interpreted():
    before = backends.serving()
    with backends.use_backend("triton"):
        assert {s["cuda"] for s in backends.serving().values()} == {"triton"}
        assert all(backends.serving()[op]["cpu"] == before[op]["cpu"] for op in ops.SCHEMAS)
    assert backends.serving() == before


def test_the_environment_chooses_triton_for_the_cpu():
    code = "from rana_kernels import backends; print(backends.serving())"
    child = python("-c", code, RANA_BACKEND="triton", TRITON_INTERPRET="1")
    assert child.stdout.count("'triton'") == 2 * len(ops.SCHEMAS), child.stderr


# The kernels in the interpreter


# what of tests/test_ops.py is interpreted: (marker, expression). All of it would take half an hour
CASES = "(isa or tiled or quantized_tiles) and not long"
SLOW = "not whole_range and not every_number"
# of quantised weights a few small ones, and those that pass the kernels' tiles: with barriers one MLP of them
FEW = "(not bits or quantized_tiles or g64 and not 300)"
FEWER = "(not bits or quantized_tiles and gate_10)"
FLOAT = "not _int8 and not _int4 and not _mixed"
FLOAT16 = "float16 and not bfloat16"  # bfloat16 moves through the same code
SELECTIONS = {
    # Both run the same code, this one in one launch with barriers between phases: exact results show that.
    # Activations and small errors are left to the other one, which leaves the extremes to this one.
    # An exact case is run in each dtype of 16 bits by one of them.
    "all phases in one program": (CASES, f"triton_whole and {SLOW} and {FEWER} and not close"),
    "phase by phase in several": (CASES, f"triton_phases and {SLOW} and {FEW} and not extremes"),
    "one token among others": (
        "not slow",
        f"triton_phases and {FLOAT16} and depend_on and (({FLOAT}) and (5 or 33) or lowrank_int4 and 5)",
    ),
    "layouts": (
        "not slow",
        f"triton_phases and {FLOAT16} and any_strides and not 40 and ({FLOAT} or lowrank_mixed)",
    ),
    "infinities": ("not slow", "triton_whole and infinity"),
}


@pytest.mark.parametrize("marker, expression", SELECTIONS.values(), ids=SELECTIONS)
def test_interpreted(marker, expression):
    """The shared tests of the ops, in a process that interprets. It makes numpy warn ten thousand times."""
    options = ["-W", "ignore::DeprecationWarning", "-m", marker, "-k", expression]
    printed = pytest_passes(*options, "tests/test_ops.py", TRITON_INTERPRET="1")
    assert re.search(r"[1-9]\d+ passed", printed), printed[-500:]


# The kernels compiled for cards


@pytest.fixture(scope="module")
def compiled():
    if backend.interpreted():
        pytest.skip("the interpreter does not compile")
    from tests.triton_compile import compile_all

    return compile_all


def some_kinds(capability: int, tokens: int) -> list[tuple[torch.dtype, int]]:
    """Return one of the dtypes of 16 bits, and 8 or 4 bits where kernels read them, or float32, or both.

    They take turns: every card has all of them, and so has every size. `make compile-check` compiles all.
    """
    from tests.triton_compile import CARDS, TOKENS

    turn = list(CARDS).index(capability) + TOKENS.index(tokens)
    dtype, bits = (torch.bfloat16, torch.float16)[turn % 2], (8, 4)[turn % 2]
    few = tokens <= 16
    return [(dtype, 16)] + [(dtype, bits)] * few + [(torch.float32, 16)] * (not few or turn % 2)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_the_card(compiled, capability):
    from tests.triton_compile import CARDS, PINNED, triton

    rows = compiled((capability,), ("1B",), some_kinds)
    assert {r.kernel.split(".")[0] for r in rows} == {*ops.SCHEMAS, "products"}
    for r in rows:
        assert r.local == 0, f"spills: {r}"
        residents = 2 if r.streams else 1
        assert residents * (r.shared + 1024) <= CARDS[capability][1] + 1024, f"too much shared memory: {r}"
        assert r.registers * r.threads * residents <= 65536, f"too many registers: {r}"
        assert r.narrow == 0, f"streams by less than 16 bytes: {r}"
        if r.tokens == 1 and r.bits < 16:
            assert r.scalars <= 2 * r.streams, f"more loads of scales than of weights: {r}"
        if triton.__version__ == PINNED and r.tokens == 1:
            assert r.registers <= 224, f"more registers than when this was written: {r}"
        assert r.streams or r.kernel.startswith("products"), f"streams nothing: {r}"


@pytest.mark.parametrize("tokens, launches", [(1, 1), (16, 1), (200, {"masked_mlp": 2, "linear": 0})])
def test_launches(compiled, tokens, launches):
    """One for decoding. For prefill, those besides cuBLAS: a mask in an epilogue, the neurons."""
    from importlib import import_module

    from tests.triton_compile import calls, compiling

    for op, arguments in calls("1B", tokens, torch.bfloat16):
        with compiling(90) as noted:
            getattr(import_module(f"rana_kernels.backends.triton.{op}"), op)(*arguments)
        wanted = launches if isinstance(launches, int) else launches.get(op, 1)
        if op == "masked_mlp" and arguments[1] is None:
            wanted = 1  # without B, the first product is not there
        assert len(noted) == wanted, (op, [name for name, _ in noted])


CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card's current stream, whether it is captured, and how many states a sheet of the supply has."""
    from rana_kernels.backends.triton import launch

    card = SimpleNamespace(stream=1, capturing=False, states=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=card.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    sheet = partial(torch.zeros, dtype=torch.int32)
    monkeypatch.setattr(launch, "_filled", lambda device: sheet(card.states, launch._STATE))
    monkeypatch.setattr(launch, "_supplies", {})
    monkeypatch.setattr(launch, "_of_stream", {})
    return card


def test_launches_that_may_meet_have_states_of_their_own(card):
    """Two streams, and every captured launch; those that follow one another on a stream share one."""
    from rana_kernels.backends.triton import launch

    first, again = launch.barrier_state(CUDA), launch.barrier_state(CUDA)
    card.stream = 2
    other, card.capturing = launch.barrier_state(CUDA), True
    captured = [launch.barrier_state(CUDA) for _ in range(4)]  # more than the supply has left
    states = [first, other, *captured]
    assert first.data_ptr() == again.data_ptr()
    assert len({state.data_ptr() for state in states}) == len(states)
    assert not any(state.any() for state in states)
    assert all(state.data_ptr() % 16 == 0 for state in states), "compiled again, maybe during a capture"


def test_states_do_not_run_out(card, monkeypatch):
    """A call outside of a capture sees to it that the next capture has at least half a sheet."""
    from rana_kernels.backends.triton import launch

    card.states = 8
    monkeypatch.setattr(launch, "_STATES", card.states)
    captured = set()
    for _ in range(20):
        card.capturing = False
        shared = launch.barrier_state(CUDA)
        card.capturing = True
        captured |= {launch.barrier_state(CUDA).data_ptr() for _ in range(4)}
    assert len(captured) == 20 * 4 and shared.data_ptr() not in captured
    lying = {state.data_ptr() for sheet in launch._supplies[0].sheets for state in sheet}
    assert captured < lying, "filled during a capture, or freed"


def test_states_are_filled_by_another_thread(monkeypatch):
    """While torch warms up for a CUDA graph, the memory that this thread allocates is the graph's."""
    from rana_kernels.backends.triton import launch

    threads, zeros = [], torch.zeros

    def noting(*size, dtype, device):
        threads.append(get_ident())
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", noting)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: threads.append(get_ident()))
    with torch.inference_mode():
        states = launch._filled(CUDA)
    assert not states.any() and not states.is_inference()
    assert len(threads) == 2 and get_ident() not in threads


def test_no_two_backends_in_python_are_registered_at_once(monkeypatch):
    """torch 2.11 refuses the second one, for the same device."""
    from rana_kernels import backends

    living: set[str] = set()

    class Registration:
        def __init__(self, name: str) -> None:
            assert not living, f"{name} beside {living}"
            living.add(name)
            self.name = name

        def _destroy(self) -> None:
            living.remove(self.name)

    monkeypatch.setattr(backends, "installed", lambda name: name in ("triton", "reference"))
    monkeypatch.setattr(backends.triton, "register", lambda names, *keys: Registration("triton"))
    monkeypatch.setitem(backends._OVERRIDES, "reference", lambda: Registration("reference"))
    monkeypatch.setattr(backends._InPython, "_library", None)
    backends.load_libraries()
    assert living == {"triton"}, "nothing compiled serves CUDA tensors"
    with backends.use_backend("reference"):
        assert living == {"reference"}
        with backends.use_backend("triton"):
            assert living == {"triton"}
        assert living == {"reference"}
    assert living == {"triton"}


# How problems are cut up


@pytest.fixture
def configurations(monkeypatch, tmp_path):
    from rana_kernels.backends.triton import configurations

    class Card:
        name, multi_processor_count = "NVIDIA Test 1", 132

    monkeypatch.setattr(configurations, "_properties", lambda device: Card)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    configurations.tables.cache_clear()
    yield configurations
    configurations.tables.cache_clear()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("M", [1, 2, 16])
@pytest.mark.parametrize("N", [1, 64, 576, 2048, 4096, 5632, 11008, 28672, 128256])
def test_work_is_dealt_out_evenly(configurations, N, M, bits):
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    config = configurations.decode_rule(M, dtype, quantized=bits < 16)
    cut = config.cut(4096, N, bits, CUDA)
    assert cut.rows * cut.columns == config.warps * 32 * config.in_flight * 8 // bits
    assert cut.shares <= config.most_shares
    assert cut.items % cut.shares == 0 and (cut.items // cut.shares) * cut.columns >= N
    rounds = -(-cut.items // config.seats(CUDA))
    assert N < 2048 or cut.items / (rounds * config.seats(CUDA)) > 0.85


def on_a_card(*shape: int) -> torch.Tensor:
    """A tensor that says it is on a card, for what looks at no more than that."""

    class There(torch.Tensor):
        device = CUDA

    return torch.empty(shape, dtype=torch.bfloat16).as_subclass(There)


def test_a_table_of_the_card_comes_before_the_rule(configurations):
    rows = on_a_card(4096, 4096)
    key = configurations.key("masked_linear", 1, torch.bfloat16, rows)
    path = configurations.own_table("nvidia-test-1")
    path.parent.mkdir(parents=True)
    mine = {"warps": 8, "residents": 1, "in_flight": 64, "columns": 256}
    path.write_text(json.dumps({"configurations": {key: mine}}))
    assert configurations.decode("masked_linear", on_a_card(1, 4096), rows) == configurations.Decode(**mine)
    found = configurations.decode("masked_linear", on_a_card(1, 4096), rows.to(torch.int8))
    assert found == configurations.decode_rule(1, torch.bfloat16, quantized=True), "of another width"
    other = configurations.decode("masked_linear", on_a_card(1, 64), on_a_card(64, 64))
    assert other == configurations.decode_rule(1, torch.bfloat16)


def test_ones_own_table_comes_before_the_shipped_one(configurations, monkeypatch, tmp_path):
    monkeypatch.setattr(configurations, "shipped_table", lambda name: tmp_path / f"shipped-{name}.json")
    fields = {"warps": 8, "residents": 1, "in_flight": 64, "columns": 256}
    for path, found in (
        (configurations.shipped_table("nvidia-test-1"), {"a": fields, "b": fields}),
        (configurations.own_table("nvidia-test-1"), {"b": {**fields, "warps": 4}}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"configurations": found}))
    assert configurations.table(CUDA) == {"a": fields, "b": {**fields, "warps": 4}}


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"configurations": {"a": {"warps": 3, "residents": 1, "in_flight": 64, "columns": 64}}}',
     '{"configurations": {"a": {"warps": "4"}}}', '{"configurations": 7}',
     '{"configurations": {"a": {"warps": 4, "residents": 1, "in_flight": 64, "columns": 64, "x": 1}}}'],
)  # fmt: skip
def test_a_broken_table_is_an_error(configurations, text):
    path = configurations.own_table("nvidia-test-1")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RuntimeError, match=r"nvidia-test-1\.json is not a table .*rana tune"):
        configurations.decode("masked_linear", on_a_card(1, 64), on_a_card(64, 64))


def test_candidates_are_valid_and_start_with_the_rule(configurations):
    for M, quantized, rule in (
        (1, False, configurations.decode_rule(1, torch.bfloat16)),
        (5, True, configurations.decode_rule(5, torch.bfloat16, quantized=True)),
        (512, False, configurations.prefill_rule(torch.bfloat16)),
    ):
        tried = list(configurations.candidates(M, torch.bfloat16, quantized))
        assert tried[0] == rule and len(tried) == len(set(tried)) > 10
        for candidate in tried:
            configurations._check(candidate)
