"""The lines of `rana info` about what is slow or missing here, each on a machine that is played."""

import os
from pathlib import Path

import pytest
import torch

import rana_kernels as rana
from rana_kernels import backends
from rana_kernels.backends import remedies
from rana_kernels.system import cpu, huge_pages


@pytest.fixture
def machine(monkeypatch):
    """A machine on which nothing is missing, but for what the test changes."""
    for name in ("RANA_BACKEND", "RANA_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)

    def play(
        built: tuple[str, ...] = ("cpu", "cuda", "triton"),
        used: str = "avx512",
        best: str = "avx512",
        threads: int = 8,
        pages: bool = True,
        packages: tuple[str, ...] = ("transformers",),
        compilers: tuple[str, ...] = ("g++",),
        cards: int = 1,
        cuda: str | None = "13.0",
        driver: str = "/proc/self/stat",
        **environment: str,
    ) -> list[str]:
        monkeypatch.setattr(backends, "installed", lambda name: name in built)
        monkeypatch.setattr(backends, "instruction_set", lambda: used)
        monkeypatch.setattr(cpu, "runnable_instruction_sets", lambda: ["baseline", best])
        monkeypatch.setattr(cpu, "is_x86", lambda: True)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
        monkeypatch.setattr(huge_pages, "available", lambda: pages)
        monkeypatch.setattr(remedies, "find_spec", lambda name: name in packages)
        monkeypatch.setattr(remedies.shutil, "which", lambda name: name in compilers)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(remedies, "DRIVER", Path(driver))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return remedies.remedies()

    return play


def test_nothing_is_said_where_nothing_is_missing(machine):
    assert machine() == []


MISSING = {
    "no library": ({"built": ("cuda",)}, "the CPU ops were not compiled", "slowly: pip install"),
    "no compiler": ({"built": ("cuda",), "compilers": ()}, "not compiled", "install a C++ compiler (g++)"),
    "an older build": ({"used": "avx2"}, "compiled for avx2, and this processor has avx512", "pip install"),
    "forced": ({"used": "avx2", "RANA_CPU_ISA": "avx2"}, "RANA_CPU_ISA limits", "unset it"),
    "limited": (
        {"used": "avx2", "best": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}, "ATEN_CPU_CAPABILITY", "unset it"
    ),
    "baseline": ({"used": "baseline", "best": "baseline"}, "no vectors beyond the baseline", "with AVX2"),
    "one thread": ({"threads": 1}, "one thread of 8 processors", "set OMP_NUM_THREADS=8"),
    "no huge pages": ({"pages": False}, "no huge pages", "Linux 6.1"),
    "no transformers": ({"packages": ()}, "transformers is missing", "pip install rana_kernels["),
    "no card": ({"cards": 0}, "torch finds no card", "nvidia-smi"),
    "torch without CUDA": ({"cards": 0, "cuda": None}, "this torch has no CUDA", "install a CUDA build"),
    "no nvcc": ({"built": ("cpu", "triton")}, "Triton serves the card", "install nvcc"),
    "no Triton": ({"built": ("cpu",)}, "PyTorch, slowly, serves the card", "install nvcc"),
    "chosen": ({"RANA_BACKEND": "reference"}, "RANA_BACKEND is 'reference'", "unset it"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "what", "remedy"), MISSING.values(), ids=MISSING.keys())
def test_one_line_for_each_thing_that_is_missing(changes, what, remedy, machine):
    (line,) = machine(**changes)
    assert what in line and remedy in line and "\n" not in line


def test_the_report_has_the_lines_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    found = rana.report()
    assert found.to_dict()["remedies"] == found.remedies == remedies.remedies()
    assert "- torch uses one thread of 3 processors: set OMP_NUM_THREADS=3" in str(found)


def test_huge_pages_are_tried():
    """As `use_huge_pages` gets them for weights of the same size."""
    weight = torch.nn.Linear(2048, 2048, bias=False)
    assert huge_pages.available() == (huge_pages.use_huge_pages(weight) > 0)
