"""The backends that serve the ops: compiled libraries, else Triton (CUDA only), else the PyTorch reference.

torch's dispatcher holds the state: no variable here remembers which library is loaded. If a library is
absent, the next backend serves its device. If a library is present and does not load, the import fails.
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
    """Return the best instruction set of this processor for which a CPU library was built.

    For tests and comparisons, `RANA_CPU_ISA` chooses another instruction set.
    """
    forced = os.environ.get("RANA_CPU_ISA")
    if forced is not None:
        if forced not in INSTRUCTION_SETS:
            raise ImportError(f"RANA_CPU_ISA is {forced!r}, wanted one of {', '.join(INSTRUCTION_SETS)}")
        return forced
    built = [name for name in runnable_instruction_sets() if _cpu_library(name).exists()]
    return built[-1] if built else "baseline"


def library(device: str) -> Path:
    """Return where the compiled ops for `device` ("cpu" or "cuda") are, if they were built."""
    return _cpu_library(instruction_set()) if device == "cpu" else _PACKAGE / "_cuda.abi3.so"


def _cpu_library(name: str) -> Path:
    return _PACKAGE / f"_cpu_{name}.abi3.so"


def installed(name: str) -> bool:
    """Return whether the backend `name` can serve: its library was built, or its package is installed."""
    return library(name).exists() if name in ("cpu", "cuda") else name != "triton" or triton.available()


def load_libraries() -> None:
    """Load the compiled ops that were built. The package calls this once, when it is imported.

    For tests and comparisons, `RANA_CPU_ROWS` chooses how the CPU's kernels read rows side by side: "far", as
    streams far apart, or "near", as neighbours. Without it, `csrc/cpu/processor.h` chooses.
    """
    rows = os.environ.get("RANA_CPU_ROWS")
    if rows not in (None, "far", "near"):
        raise ImportError(f"RANA_CPU_ROWS is {rows!r}, wanted far or near")
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
    """Choose the backend: `"auto"`, `"reference"` (plain PyTorch), `"cpu"`, `"cuda"` or `"triton"`.

    The choice takes effect at once, for the whole process. As a context manager, it ends with the block.
    A backend takes over its own device and does not change the other: `"triton"` serves CUDA tensors, and
    under `TRITON_INTERPRET=1` CPU tensors as well. Use it for debugging, tests and comparisons. The
    environment variable `RANA_BACKEND` makes the same choice at import.

    Raises ValueError for an unknown name, and RuntimeError if that backend is not installed.
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


def _register_default() -> torch.library.Library | None:
    """Register Triton for CUDA tensors if no compiled library serves them."""
    needed = not installed("cuda") and installed("triton")
    return triton.register(ops.SCHEMAS, "CUDA") if needed else None


# While a backend in Python is registered, it hides the compiled ones.
_OVERRIDES = {"reference": _register_reference, "triton": _register_triton}


class _InPython:
    """The only registration from Python. Older versions of torch refuse a second one for the same device."""

    current: str | None = None
    _library: torch.library.Library | None = None

    @classmethod
    def install(cls, name: str | None) -> None:
        """Register the backend `name`. None: register a backend only for what no compiled library serves."""
        if cls._library is not None:
            if name == cls.current:
                return
            cls._library._destroy()
        with warnings.catch_warnings():
            # torch warns that a kernel is overridden, which is the purpose here
            warnings.simplefilter("ignore", UserWarning)
            cls._library = (_register_default if name is None else _OVERRIDES[name])()
        cls.current = name


def serving() -> dict[str, dict[str, str]]:
    """Ask the dispatcher which backend serves each op on each device: {op: {device: backend}}."""
    return {
        name: {device: _server(f"rana::{name}", key) for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))}
        for name in ops.SCHEMAS
    }


def _server(op: str, key: str) -> str:
    """Return the backend behind a dispatch key, recognised by the file that registered the kernel."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "reference"
    table = torch._C._dispatch_dump(op)
    line = next(line for line in table.splitlines() if line.startswith(f"{key}:"))
    homes = {"cpu": "csrc/cpu/", "cuda": "csrc/cuda/", "triton": "backends/triton/"}
    return next((backend for backend, home in homes.items() if home in line), "reference")
