"""Who serves the ops: compiled libraries, else Triton (for CUDA tensors), else the PyTorch reference.

State is asked of torch's dispatcher, never remembered: a library is loaded or it is not. A library
that is absent leaves its device to the next in line; one that is present and does not load raises.
"""

import os
import warnings
from pathlib import Path

import torch

from rana_kernels import ops
from rana_kernels.backends import triton
from rana_kernels.ops import reference
from rana_kernels.system.cpu import INSTRUCTION_SETS, runnable_instruction_sets

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
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
    built = [name for name in runnable_instruction_sets() if _cpu_library(name).exists()]
    return built[-1] if built else "baseline"


def library(device: str) -> Path:
    """Where the compiled ops for `device` ("cpu" or "cuda") are, if they were built."""
    return _cpu_library(instruction_set()) if device == "cpu" else _PACKAGE / "_cuda.abi3.so"


def _cpu_library(name: str) -> Path:
    return _PACKAGE / f"_cpu_{name}.abi3.so"


def installed(name: str) -> bool:
    """Whether the backend of that name could serve: its library was built, its package is there."""
    return library(name).exists() if name in ("cpu", "cuda") else name != "triton" or triton.available()


def load_libraries() -> None:
    """Load the compiled ops that are there. Called once, when the package is imported."""
    for device in ("cpu", "cuda"):
        if installed(device):
            _load(library(device))
    _InPython.install(None)


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"rana_kernels: {path.name} does not load with torch {torch.__version__}: {error}\n"
            "Build the package again (pip install --no-build-isolation .), or delete that file: "
            "another backend then serves the ops."
        ) from error


class use_backend:
    """Choose who serves the ops: `"auto"`, `"reference"` (plain PyTorch), `"cpu"`, `"cuda"` or `"triton"`.

    Takes effect at once, for the whole process; as a context manager, until the block ends. A backend
    takes over its own device and leaves the other as it is: `"triton"` serves CUDA tensors, and under
    `TRITON_INTERPRET=1` CPU tensors as well. For debugging, tests and comparisons. `RANA_BACKEND`
    chooses at import.

    Raises ValueError for an unknown name, RuntimeError where that backend is not installed.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}, wanted one of {', '.join(NAMES)}")
        _require(name)
        self._before = _InPython.current
        _InPython.install(name if name in _OVERRIDES else None)

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *_: object) -> None:
        _InPython.install(self._before)


def _require(name: str) -> None:
    if installed(name):
        return
    if name in ("cpu", "cuda"):
        tools = {"cpu": "a C++ compiler and torch are", "cuda": "nvcc, a C++ compiler and torch are"}[name]
        raise RuntimeError(
            f"the {name} backend was not built ({library(name).name} is missing): install the package "
            f"where {tools} at hand, pip install --no-build-isolation ."
        )
    raise RuntimeError("the triton backend needs the triton package: pip install triton")


def _register_reference() -> torch.library.Library:
    library = torch.library.Library("rana", "IMPL")
    for name in ops.SCHEMAS:
        for key in ("CPU", "CUDA"):
            library.impl(name, getattr(reference, name), key)
    return library


def _register_triton() -> torch.library.Library:
    keys = ("CUDA", "CPU") if triton.interpreted() else ("CUDA",)
    return triton.register(ops.SCHEMAS, *keys)


def _register_the_rest() -> torch.library.Library | None:
    """Triton, where no compiled library serves CUDA tensors."""
    absent = not installed("cuda") and installed("triton")
    return triton.register(ops.SCHEMAS, "CUDA") if absent else None


# The backends in Python hide the compiled ones while they are registered.
_OVERRIDES = {"reference": _register_reference, "triton": _register_triton}


class _InPython:
    """The one registration from Python that lives: older versions of torch refuse a second for one device."""

    current: str | None = None
    _library: torch.library.Library | None = None

    @classmethod
    def install(cls, name: str | None) -> None:
        """That of `name`, or what the compiled libraries leave to be served."""
        if cls._library is not None:
            if name == cls.current:
                return
            cls._library._destroy()
        with warnings.catch_warnings():
            # torch warns of an overridden kernel; overriding it is what was asked for
            warnings.simplefilter("ignore", UserWarning)
            cls._library = (_register_the_rest if name is None else _OVERRIDES[name])()
        cls.current = name


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
    homes = {"cpu": "csrc/cpu/", "cuda": "csrc/cuda/", "triton": "backends/triton/"}
    return next((backend for backend, home in homes.items() if home in line), "reference")
