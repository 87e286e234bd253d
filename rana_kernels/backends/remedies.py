"""What makes the package slow or incomplete on this machine: a line for each thing, with its remedy."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from rana_kernels import backends
from rana_kernels.system import cpu, huge_pages

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps . in the sources"
COMPILERS = ("c++", "g++", "clang++")
DRIVER = Path("/proc/driver/nvidia/version")  # there if an NVIDIA driver is loaded


def remedies() -> list[str]:
    """Return the lines for this process. There are none where nothing is missing."""
    found = (_chosen(), _cpu_library(), _instruction_set(), _threads(), _pages(), _transformers(), _cuda())
    return [line for line in found if line]


def _chosen() -> str:
    name = os.environ.get("RANA_BACKEND", "auto")
    return "" if name == "auto" else f"RANA_BACKEND is {name!r}: unset it, and the fastest backend serves"


def _cpu_library() -> str:
    if backends.installed("cpu"):
        return ""
    has_compiler = any(map(shutil.which, COMPILERS))
    first = "" if has_compiler else "install a C++ compiler (g++) first, then "
    return f"the CPU ops were not compiled, and PyTorch serves them slowly: {first}{BUILD}"


def _instruction_set() -> str:
    if not backends.installed("cpu"):
        return ""
    used, best = backends.instruction_set(), cpu.runnable_instruction_sets()[-1]
    if used == best:
        limit = os.environ.get("ATEN_CPU_CAPABILITY")
        if limit:
            return f"ATEN_CPU_CAPABILITY is {limit!r} and limits the CPU ops to {used}: unset it"
        slow = "the CPU ops use no vectors beyond the baseline, which is slow: take a processor with AVX2"
        return slow if used == "baseline" and cpu.is_x86() else ""
    if os.environ.get("RANA_CPU_ISA"):
        return f"RANA_CPU_ISA limits the CPU ops to {used}, and this processor has {best}: unset it"
    return f"the CPU ops were compiled for {used}, and this processor has {best}: {BUILD}"


def _threads() -> str:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > 1 or allowed == 1:
        return ""
    return f"torch uses one thread of {allowed} processors: set OMP_NUM_THREADS={allowed}"


def _pages() -> str:
    if huge_pages.available():
        return ""
    return (
        "weights get no huge pages, so that scattered rows are read more slowly: Linux 6.1 or later gives "
        "them, unless a sandbox refuses madvise"
    )


def _transformers() -> str:
    if find_spec("transformers"):
        return ""
    return (
        "transformers is missing, which rana.load, rana.save and the commands need: "
        "pip install rana_kernels[transformers]"
    )


def _cuda() -> str:
    cards = torch.cuda.device_count()
    if torch.version.cuda is None and DRIVER.exists():
        return "this torch has no CUDA, and the machine has an NVIDIA driver: install a CUDA build of torch"
    if backends.installed("cuda") and cards == 0:
        return "the CUDA ops were compiled, and torch finds no card: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    if cards and not backends.installed("cuda"):
        server = "Triton" if backends.installed("triton") else "PyTorch, slowly,"
        return f"the CUDA ops were not compiled, and {server} serves the card: install nvcc, then {BUILD}"
    return ""
