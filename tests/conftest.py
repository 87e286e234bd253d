"""What the op tests share: the implementations, a seed for each test and poisoned memory."""

import contextlib
import ctypes
import gc
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

import pytest
import torch

import rana_kernels.ops  # noqa: F401 - defines torch.ops.rana
from rana_kernels.backends import triton
from rana_kernels.ops import reference
from tests import two_processes
from tests.cases import DTYPES, Case

OUTCOMES = pytest.StashKey[dict]()
# Those that take most, the longest first. pytest-xdist would start files with many tests first.
LONGEST_FILES = (
    "test_cuda_shim", "test_triton", "test_ops", "test_export", "test_two_processes", "test_cuda_build",
    "test_isa", "test_compress", "test_architectures", "test_whole_model", "test_bench_decode", "test_bench",
)  # fmt: skip
# Tests that compile kernels or start a process of their own, and share nothing that takes long to make.
ONE_BY_ONE = re.compile(
    r"test_a_mutant_is_found_out|test_interpreted|test_ops_are_exact_and_close_on|test_kernels_fit_the_card"
)


@dataclass(frozen=True)
class Implementation:
    """A way to run the ops, called with the op's name and its arguments by name.

    `turn`: 0 and 1 for two ways to interpret the same kernels. Each runs a case in float32 and in one of the
    dtypes of 16 bits, the other one at the other turn. None: in every dtype.
    """

    name: str
    device: str
    function: Callable[[str], Callable]
    turn: int | None = None

    def dtypes(self, case: Case) -> tuple[torch.dtype, ...]:
        """Return the dtypes in which a case is run."""
        if self.turn is None:
            return DTYPES
        turn = self.turn + (zlib.crc32(case.id.encode()) >> 8)
        return torch.float32, (torch.bfloat16, torch.float16)[turn % 2]

    def __call__(self, op: str, args: dict) -> torch.Tensor:
        return self.function(op)(*args.values())


def _registered(op: str) -> Callable:
    return getattr(torch.ops.rana, op).default


def _triton(programs: int | None = None) -> Callable:
    """The Triton backend; `programs`: how many of them run at a time, if not as the card says."""

    def find(op: str) -> Callable:
        function = getattr(import_module(f"rana_kernels.backends.triton.{op}"), op)
        decode = import_module("rana_kernels.backends.triton.configurations").Decode

        def call(*args) -> torch.Tensor:
            with mock.patch.object(decode, "seats", lambda self, device: programs):
                return function(*args)

        return function if programs is None else call

    return find


def _patch_once() -> None:
    """Have triton's interpreter patch its language once for each module.

    It does so at every call of a function, which takes a third of its time. A process that interprets
    compiles nothing, so nothing has to be undone.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function: Callable):
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


# a backend joins every test by a line here
IMPLEMENTATIONS = [
    Implementation("reference", "cpu", lambda op: getattr(reference, op)),
    Implementation("registered", "cpu", _registered),
    Implementation("registered_cuda", "cuda", _registered),
    Implementation("triton_cuda", "cuda", _triton()),
]
if triton.interpreted():
    _patch_once()
    # one program runs a whole kernel, barriers and all; several run it phase by phase
    IMPLEMENTATIONS += [
        Implementation("triton_whole", "cpu", _triton(programs=1), turn=0),
        Implementation("triton_phases", "cpu", _triton(programs=5), turn=1),
    ]


def _here(implementation: Implementation) -> bool:
    if implementation.name.startswith("triton") and not triton.available():
        return False
    return implementation.device == "cpu" or torch.cuda.is_available()


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(i, id=i.name, marks=[pytest.mark.gpu] if i.device == "cuda" else [])
        for i in IMPLEMENTATIONS
        if _here(i)
    ],
)
def implementation(request) -> Implementation:
    return request.param


def pytest_configure(config) -> None:
    # the problems are small: threads would only wait for one another, and for those of other processes
    torch.set_num_threads(1)
    config.option.markexpr = config.option.markexpr or "not slow and not stacks"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first, so that no core is idle while the last of them runs."""
    rank = {name: i for i, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Take the thousands of tests out of what the garbage collector looks through."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, deal out the tests `ONE_BY_ONE` singly: files of them would end last."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, test = nodeid.split("::", 1)
            return nodeid if ONE_BY_ONE.match(test) else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run tests marked `two_processes` there: all of a file at its first one."""
    if two_processes.inside() or not pyfuncitem.get_closest_marker("two_processes"):
        return None
    module, outcomes = pyfuncitem.module, pyfuncitem.config.stash.setdefault(OUTCOMES, {})
    if module not in outcomes:
        factory: pytest.TempPathFactory = pyfuncitem._request.getfixturevalue("tmp_path_factory")
        outcomes[module] = two_processes.run_both(module, factory.mktemp("two_processes"))
    two_processes.tell(pyfuncitem.name, outcomes[module])
    return True


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what did not run, and what stood behind `registered`."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    plain = [op for op in rana_kernels.ops.SCHEMAS if not has(f"rana::{op}", "CPU")]
    absent = [i.name for i in IMPLEMENTATIONS if not _here(i)]
    if plain:
        terminalreporter.write_line(
            f"rana: not built, the reference ran instead: {', '.join(plain)} on the CPU"
        )
    if absent:
        terminalreporter.write_line(f"rana: not run, no CUDA device: {', '.join(absent)}")


# torch.manual_seed keeps a stack trace for each kind of device that is not there, which takes 2 ms.
GENERATOR = torch if torch.cuda.is_available() else torch.default_generator


@pytest.fixture(autouse=True)
def seed() -> None:
    GENERATOR.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def whole_sums():
    """cuBLAS may not add parts of a sum up in 16 bits, as torch lets it."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fill fresh memory: torch's tensors with NaN, malloc's with 0x7F, which is huge or NaN in each dtype."""
    with contextlib.suppress(OSError, AttributeError):  # mallopt is glibc's
        ctypes.CDLL(None).mallopt(-6, 0x80)  # M_PERTURB
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
