"""The compiled CPU library of every instruction set this processor has, each in a process of its own."""

import os
import re
from pathlib import Path

import pytest

from rana_kernels import backends
from rana_kernels.system import cpu
from tests.subprocesses import pytest_passes, python

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
AVX512_BF16 = AVX512 | {"avx512_vnni", "avx512_bf16"}
NEEDS = {
    "baseline": set(),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": AVX512_BF16 | {"amx_tile", "amx_bf16"},
}


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    found = re.search(
        r"^(?:flags|Features)\s*:(.*)$", info.read_text() if info.exists() else "", re.MULTILINE
    )
    return set(found[1].split()) if found else set()


def libraries() -> dict[str, Path]:
    package = Path(backends.__file__).parent.parent
    return {p.name.removeprefix("_cpu_").split(".")[0]: p for p in package.glob("_cpu_*.so")}


def test_every_instruction_set_is_known():
    assert list(NEEDS) == list(cpu.INSTRUCTION_SETS)
    assert set(libraries()) <= set(NEEDS)


@pytest.mark.isa
def test_the_library_chosen_is_the_one_that_runs():
    """In this process, and again in those started below."""
    loaded = set(re.findall(r"_cpu_\w+(?=\.abi3\.so)", Path("/proc/self/maps").read_text()))
    if not libraries():
        pytest.skip("no CPU library is built")
    assert loaded == {f"_cpu_{backends.instruction_set()}"}
    if "RANA_CPU_ISA" in os.environ:
        assert backends.instruction_set() == os.environ["RANA_CPU_ISA"]
    assert {served["cpu"] for served in backends.serving().values()} == {"cpu"}


def test_the_best_instruction_set_is_chosen():
    if "RANA_CPU_ISA" in os.environ or "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("the environment chooses")
    runnable = [isa for isa, flags in NEEDS.items() if flags <= processor_flags()]
    assert backends.instruction_set() == runnable[-1]


def test_of_what_was_not_built_the_next_best_is_chosen(monkeypatch, tmp_path):
    """An older compiler does not know every instruction set."""
    monkeypatch.delenv("RANA_CPU_ISA", raising=False)
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    monkeypatch.setattr(backends, "runnable_instruction_sets", lambda: list(NEEDS))
    assert backends.instruction_set() == "baseline"
    for name in ("avx2", "avx512"):
        (tmp_path / f"_cpu_{name}.abi3.so").touch()
    assert backends.instruction_set() == "avx512"


def test_where_tiles_are_refused_they_are_not_chosen(monkeypatch):
    monkeypatch.delenv("RANA_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "_may_use_tiles", lambda: False)
    assert backends.instruction_set() != "amx"


@pytest.mark.parametrize("isa", NEEDS)
def test_ops_are_exact_and_close_on(isa):
    if isa not in libraries():
        pytest.skip(f"_cpu_{isa} is not built")
    if absent := NEEDS[isa] - processor_flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(absent))}")
    options = ["-m", "isa", "-k", "not reference"]
    printed = pytest_passes(*options, "tests/test_ops.py", "tests/test_isa.py", RANA_CPU_ISA=isa)
    assert re.search(r"[1-9]\d\d passed", printed), printed[-500:]


def test_an_unknown_instruction_set_is_refused():
    child = python("-c", "import rana_kernels", RANA_CPU_ISA="sse9")
    assert child.returncode != 0 and "RANA_CPU_ISA is 'sse9', wanted one of baseline" in child.stderr


@pytest.mark.parametrize("rows", ["near", "far"])
def test_ops_are_exact_and_close_with_rows(rows):
    """One and two tokens, whose rows are read in this order on other processors."""
    if not libraries():
        pytest.skip("no CPU library is built")
    options = ["-m", "isa", "-k", "(Mx1 or Mx2) and not reference"]
    printed = pytest_passes(*options, "tests/test_ops.py", RANA_CPU_ROWS=rows)
    assert re.search(r"[1-9]\d\d passed", printed), printed[-500:]


def test_an_unknown_order_of_rows_is_refused():
    child = python("-c", "import rana_kernels", RANA_CPU_ROWS="apart")
    assert child.returncode != 0 and "RANA_CPU_ROWS is 'apart', wanted far or near" in child.stderr
