"""Who serves the ops. Compiled libraries override the plain PyTorch reference on their device.

State is asked of torch's dispatcher, never remembered: a library is loaded or it is not. A library
that is absent leaves its device to the reference; one that is present and does not load raises.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from rana_kernels import ops
from rana_kernels.backends import reference

NAMES = ("auto", "reference", "cpu")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
_PACKAGE = Path(__file__).parent.parent


def instruction_set() -> str:
    """The best instruction set of this processor that the CPU library is compiled for.

    `RANA_CPU_ISA` names a lesser one, for tests and comparisons.
    """
    forced = os.environ.get("RANA_CPU_ISA")
    if forced is not None:
        if forced not in INSTRUCTION_SETS:
            raise ImportError(f"RANA_CPU_ISA is {forced!r}, wanted one of {', '.join(INSTRUCTION_SETS)}")
        return forced
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512_bf16" if "avx512_bf16" in _processor_flags() else "avx512"
    return "avx2" if capability == "AVX2" else "baseline"


def _processor_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def cpu_library() -> Path:
    """Where the compiled CPU ops for this processor are, if they were built."""
    return _PACKAGE / f"_cpu_{instruction_set()}.abi3.so"


def load_libraries() -> None:
    """Load the compiled ops that are there. Called once, when the package is imported."""
    library = cpu_library()
    if not library.exists():
        return
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"rana_kernels: {library.name} does not load with torch {torch.__version__}: {error}\n"
            "Build the package again (pip install --no-build-isolation .), or delete that file: "
            "the ops then run on plain PyTorch."
        ) from error


class use_backend:
    """Choose who serves the ops: `"auto"`, `"reference"` (plain PyTorch) or `"cpu"` (compiled).

    Takes effect at once, for the whole process; as a context manager, until the block ends.
    For debugging, tests and comparisons. `RANA_BACKEND` chooses at import.

    Raises ValueError for an unknown name, RuntimeError where the compiled library was not built.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}, wanted one of {', '.join(NAMES)}")
        if name == "cpu" and not cpu_library().exists():
            raise RuntimeError(
                f"the cpu backend was not built ({cpu_library().name} is missing): install the package "
                "where a C++ compiler and torch are at hand, pip install --no-build-isolation ."
            )
        self._before = _Override.current
        _Override.install(reference if name == "reference" else None)

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *_: object) -> None:
        _Override.install(self._before)


class _Override:
    """Registrations that hide those of the compiled libraries while they live."""

    current: object | None = None
    _library: torch.library.Library | None = None

    @classmethod
    def install(cls, backend: object | None) -> None:
        if backend is cls.current:
            return
        if cls._library is not None:
            cls._library._destroy()
        cls._library = _register(backend) if backend is not None else None
        cls.current = backend


def _register(backend: object) -> torch.library.Library:
    library = torch.library.Library("rana", "IMPL")
    with warnings.catch_warnings():
        # torch warns of an overridden kernel; overriding it is what was asked for
        warnings.simplefilter("ignore", UserWarning)
        for name in ops.SCHEMAS:
            kernel: Callable = getattr(backend, name)
            for key in ("CPU", "CUDA"):
                library.impl(name, kernel, key)
    return library


def serving() -> dict[str, dict[str, str]]:
    """What serves each op on each device, asked of the dispatcher: {op: {device: backend}}."""
    return {
        name: {device: _server(f"rana::{name}", key) for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))}
        for name in ops.SCHEMAS
    }


def _server(op: str, key: str) -> str:
    """The backend behind a dispatch key, from the file that registered it."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "reference"
    table = torch._C._dispatch_dump(op)
    line = next(line for line in table.splitlines() if line.startswith(f"{key}:"))
    return next((b for b in ("cpu", "cuda", "triton") if f"csrc/{b}/" in line), "reference")
