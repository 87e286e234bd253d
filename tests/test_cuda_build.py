"""The compiled CUDA library loads without a card, and its machine code is what the kernels were written for.

`make build` compiles it wherever nvcc is; cuobjdump then reads what ptxas made of it. Registers are compared
with a table (`python -m tests.test_cuda_build` writes it), but only for the compiler it was written with.
"""

import itertools
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from rana_kernels import backends, ops
from tests.subprocesses import python

TABLE = Path(__file__).with_name("cuda_registers.txt")
PINNED = "release 13.0"
TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"f": "float32", "N3c108BFloat16E": "bfloat16", "N3c104HalfE": "float16"}
# of float weights, and of weights of which some are quantised
TOKENS = {"Plain": (1, 8, 16), "AnyWidth": (1, 16)}
KERNEL = re.compile(
    r"\d(masked_\w+|linear)_kernelI\w*?\d(Plain|AnyWidth)I(f|N3c108BFloat16E|N3c104HalfE)EELi(\d+)E"
)
WIDE = r"LDG\.E\.(EF\.128|128\.EF)"  # a load of weights, 16 bytes at a time
LIBRARY = backends.library("cuda")

built = pytest.mark.skipif(
    not LIBRARY.exists(), reason="no CUDA library: there was no nvcc when it was built"
)


def keys() -> list[tuple[str, str, str, int]]:
    """(op, storage, dtype, tokens) of the kernels. Float weights in 16 bits have one of `masked_linear`."""
    return [
        (op, storage, dtype, tokens)
        for op, (storage, several), dtype in itertools.product(ops.SCHEMAS, TOKENS.items(), DTYPES.values())
        for tokens in several
        if tokens == 1 or (op, storage) != ("masked_linear", "Plain") or dtype == "float32"
    ]


@cache
def cuobjdump(*options: str) -> str:
    """What the toolkit's cuobjdump, or the one in the triton package, says about the library."""
    bundled = Path(sys.prefix).glob("lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump")
    tool = shutil.which("cuobjdump") or next(map(str, bundled), None)
    if tool is None:
        pytest.skip("no cuobjdump, on the path or with triton")
    done = subprocess.run([tool, *options, str(LIBRARY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def key_of(kernel: re.Match[str]) -> tuple[str, str, str, int]:
    return kernel[1], kernel[2], DTYPES[kernel[3]], int(kernel[4])


def resources() -> dict[tuple, dict[str, int]]:
    """{(target, *key): {"REG": 128, "STACK": 0, ...}} of the decode kernels."""
    found, target, kernel = {}, None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if arch := re.search(r"arch = (\w+)", line):
            target = arch[1]
        elif function := re.search(r"Function (\S+):", line):
            kernel = KERNEL.search(function[1])
        elif kernel and "REG:" in line:
            found[(target, *key_of(kernel))] = {
                name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)
            }
            kernel = None
    return found


def table() -> str:
    found, targets = resources(), " ".join(TARGETS)
    lines = [f"# op storage dtype tokens, then registers a thread on {targets}; nvcc {PINNED}"]
    for key in keys():
        registers = [found[(target, *key)]["REG"] for target in TARGETS]
        lines.append(" ".join(map(str, (*key, *registers))))
    return "\n".join(lines) + "\n"


def compiler_is_pinned() -> bool:
    nvcc = shutil.which("nvcc")
    return bool(nvcc) and PINNED in subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def addressed_code(target: str) -> dict[tuple, dict[int, str]]:
    """{key: {address: instruction}} of the decode kernels."""
    kernel, found = None, {}
    for line in cuobjdump("-sass", "-arch", target).splitlines():
        if function := re.search(r"Function : (\S+)", line):
            kernel = KERNEL.search(function[1])
        elif kernel and (instruction := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line)):
            found.setdefault(key_of(kernel), {})[int(instruction[1], 16)] = instruction[2]
    return found


def machine_code(target: str) -> dict[tuple, list[str]]:
    """{key: instructions} of the decode kernels."""
    return {key: list(code.values()) for key, code in addressed_code(target).items()}


def loops_of_weights(code: dict[int, str]) -> list[float]:
    """The instructions for a byte of weights in each innermost loop that reads them, the fewest first."""
    lines, loops = list(code), []
    for end, instruction in code.items():
        if (back := re.search(r"BRA.*?(0x[0-9a-f]+)", instruction)) and int(back[1], 16) < end:
            body = [code[at] for at in lines if int(back[1], 16) <= at <= end]
            if reads := len(places(body, WIDE)):
                loops.append((int(back[1], 16), end, len(body) / (16 * reads)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return sorted(each for *_, each in inner)


def places(code: list[str], instruction: str) -> list[int]:
    return [i for i, line in enumerate(code) if re.search(instruction, line)]


def wide_loads(op: str, storage: str, dtype: str, tokens: int) -> int:
    """Loads of 16 bytes that a kernel must have: for the first weights of a phase, and those that follow.

    Where weights have any width, each phase has them for rows of floats, of bytes and of nibbles.
    """
    several = {"float32": 32 // tokens, "bfloat16": 8, "float16": 8}[dtype]
    project, expand = {"floats": 2 * (8 if tokens == 1 else several)}, {"floats": 8 if tokens == 1 else 4}
    if storage == "Plain" and tokens > 1 and dtype == "bfloat16":
        expand["floats"] = 2 * 4 * (16 // tokens)
    if storage == "AnyWidth":
        by_threads = dtype == "float32" and tokens == 1
        project |= dict.fromkeys(("bytes", "nibbles"), 2 * (8 if by_threads else 4))
        expand |= {"bytes": 8, "nibbles": 8 if tokens == 1 else 4}
    projections = int(op != "masked_linear")
    expansions = {"linear": 0, "masked_mlp": 3 if storage == "Plain" else 2}.get(op, 1)
    return projections * sum(project.values()) + expansions * sum(expand.values())


@built
def test_every_kernel_is_there_and_has_a_multiprocessor_to_itself():
    found = resources()
    assert set(found) == {(target, *key) for target in TARGETS for key in keys()}
    for key, used in found.items():
        assert used["REG"] <= 128, (key, used)  # of 512 threads
        # values that are needed before and after a loop may leave the registers, no more; the kernels of
        # several tokens for any width have many such loops
        most = 384 if key[2] == "AnyWidth" and key[4] > 1 else 128
        assert used["STACK"] <= most and used["LOCAL"] == 0, (key, used)
        # shared memory is asked for at the launch; 1 KB belongs to the system from sm_90 on
        assert used["SHARED"] <= 1024, (key, used)


@built
def test_registers_are_those_of_the_table():
    if not compiler_is_pinned():
        pytest.skip(f"the table is for nvcc {PINNED}")
    assert table() == TABLE.read_text()


@built
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_read_16_bytes_at_a_time_and_nothing_is_spilled_meanwhile(target):
    kernels = machine_code(target)
    assert set(kernels) == {key[1:] for key in resources() if key[0] == target}
    for key, code in kernels.items():
        wide = places(code, WIDE)
        assert len(wide) == wide_loads(*key), key
        products = places(code, "HMMA")
        op, storage, dtype, tokens = key
        if storage == "AnyWidth":  # one token is left to threads in rows, and in float32
            multiplied = tokens > 1 or (dtype != "float32" and op != "masked_linear")
        else:
            multiplied = tokens > 1 and dtype != "float32"
        assert bool(products) == multiplied, key
        # the columns of quantised rows are passed on through shared memory
        assert bool(places(code, r"LDSM\.16\.MT88\.4")) == (
            tokens > 1 and storage == "AnyWidth" and op != "linear"
        )
        for first, last in itertools.pairwise(sorted(wide + products)):
            between = code[first:last]
            spilled = places(between, r"\b(STL|LDL)\b") if not places(between, "BRA") else []
            # 16-bit types have sums of sixteen tokens beside the products: on sm_80 one value has no room;
            # three parts of x in float32 leave none for one value on sm_100
            tight = {("sm_80", "Plain", short, 16) for short in ("bfloat16", "float16")}
            tight.add(("sm_100", "AnyWidth", "float32", 16))
            assert len(spilled) <= ((target, *key[1:]) in tight), (key, first)


# of one token in bfloat16, as bench/NOTES.md says: rows and B of floats, of bytes, B and rows of nibbles
BUDGET = (2.3, 2.8, 4.8, 5.3, 6.2, 7.9)


@built
def test_a_byte_of_weights_takes_few_instructions():
    if not compiler_is_pinned():
        pytest.skip(f"the budget is for nvcc {PINNED}")
    found = loops_of_weights(addressed_code("sm_90")["masked_lowrank_linear", "AnyWidth", "bfloat16", 1])
    assert len(found) == len(BUDGET)
    assert all(each <= most for each, most in zip(found, BUDGET, strict=True)), found


@built
def test_ptx_for_later_cards():
    assert TARGETS[0] in cuobjdump("--list-ptx")


def test_one_ptx_serves_all_cards():
    """The compiler's front end runs once, so code within `#if __CUDA_ARCH__` would be the first card's."""
    sources = [path for path in Path("csrc").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h")]
    assert sources and not [str(path) for path in sources if "__CUDA_ARCH__" in path.read_text()]


@built
def test_the_library_loads_and_serves_without_a_card():
    """On this torch, whatever it was built with; and importing it starts nothing on a device."""
    code = "import torch, rana_kernels; from rana_kernels import backends; print(backends.serving())"
    code += "; assert not torch.cuda.is_initialized()"
    child = python("-c", code)
    assert child.returncode == 0, child.stderr
    served = eval(child.stdout.splitlines()[-1])
    assert {op: devices["cuda"] for op, devices in served.items()} == dict.fromkeys(ops.SCHEMAS, "cuda")


@built
def test_what_only_a_torch_with_cuda_has_is_weak():
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("no binutils")
    symbols = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream", symbols, re.MULTILINE)
    needed = subprocess.run(
        ["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    # libtorch.so brings libtorch_cuda where there is one; CUDA's runtime is inside the library
    assert "[libtorch.so]" in needed and "libcudart" not in needed and "libtorch_cuda" not in needed


if __name__ == "__main__":
    TABLE.write_text(table())
