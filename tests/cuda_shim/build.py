"""Compiles the sources of csrc/cuda with the host's compiler, into a library that serves CPU tensors."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils import cpp_extension

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
OPS = ("masked_linear", "masked_lowrank_linear", "masked_mlp", "linear")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020A000000000000",
    "-w",  # pragmas and attributes of nvcc
)
# kernels for the CPU's dispatch key
CHANGES = {"(rana, CUDA, m)": "(rana, CPU, m)"}
Mutation = tuple[str, str, str]


def build(
    folder: Path, ops: Iterable[str] = OPS, sanitize: bool = False, mutation: Mutation | None = None
) -> Path:
    """The library with these ops, in `folder`. `mutation`: a file, a text that it has once, and another."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"), dirs_exist_ok=True)
    for path in (sources / "cuda").iterdir():
        text = path.read_text()
        for before, after in CHANGES.items():
            text = text.replace(before, after)
        if mutation and path.name == mutation[0]:
            assert text.count(mutation[1]) == 1, f"{path.name} has {mutation[1]!r} {text.count(mutation[1])}x"
            text = text.replace(mutation[1], mutation[2])
        path.write_text(text)
    flags = [*FLAGS, *(SANITIZE if sanitize else ())]
    includes = [f"-I{SHIM}", *(f"-isystem{p}" for p in cpp_extension.include_paths())]
    inputs = [(sources / "cuda" / f"{op}.cu", folder / f"{op}.o") for op in ops]
    inputs.append((SHIM / "shim.cpp", folder / "shim.o"))
    compiler = os.environ.get("CXX", "c++")
    for source, target in inputs:
        _run(compiler, "-x", "c++", "-c", source, "-o", target, *flags, *includes)
    library = folder / "shim.so"
    torch_libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
    # our stream and device guard, not those of a torch that knows no CUDA
    link = ["-shared", "-Wl,-Bsymbolic", *flags, *torch_libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(compiler, *(target for _, target in inputs), "-o", library, *link)
    return library


def preload() -> str:
    """The sanitizers' runtimes, which have to come before everything else in a process."""
    compiler = os.environ.get("CXX", "c++")
    names = [_run(compiler, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    return " ".join(name for name in names if Path(name).is_absolute())


def load(library: Path) -> None:
    """Serve the CPU with this library, in place of whatever does, and give torch cuBLAS's wide product."""
    torch.ops.load_library(library)
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("mm.dtype", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype), "CPU")
    _kept.append(aten)


# registrations live as long as these objects
_kept: list[torch.library.Library] = []


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
