"""Compiles the sources of csrc/cuda with the host's compiler, into a library that serves CPU tensors."""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils import cpp_extension

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent
OPS = ("masked_linear", "masked_lowrank_linear", "masked_mlp", "linear")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
FLAGS = (
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020A000000000000",
    "-w",  # pragmas and attributes of nvcc
)
# Kernels are compiled for the CPU's dispatch key.
CPU = {"(rana, CUDA, m)": "(rana, CPU, m)"}
# Most of the compiler's work is done again for each dtype. These changes leave one.
_FLOAT, _BFLOAT16 = (
    "if (dtype == ScalarType::Float) f(float{});",
    "if (dtype == ScalarType::BFloat16) f(bfloat16{});",
)
_HALF = {"else f(half{});": ""}
ONE_DTYPE = {
    torch.float32: {f"else {_BFLOAT16}": "", **_HALF},
    torch.bfloat16: {f"{_FLOAT}\n  else {_BFLOAT16}": _BFLOAT16, **_HALF},
}
# These leave one kind of weights: floats in whole packets, or weights of any width.
_PLAIN, _ANY = "if (plain) f(Storage<Plain<T>>{});", "else f(Storage<AnyWidth<T>>{});"
FLOATS, ANY_WIDTH = {f"\n  {_ANY}": ""}, {f"{_PLAIN}\n  else ": ""}
Mutation = tuple[str, str, str]


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return `target`, which the first process that asks makes while the others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            make(target)
    return target


def build(
    folder: Path,
    shared: Path,
    ops: Iterable[str] = OPS,
    sanitize: bool = False,
    changes: dict[str, str] | None = None,
    mutation: Mutation | None = None,
) -> Path:
    """Build the library with these ops in `folder`, and what every library needs in `shared`, once.

    `changes`: texts of the sources and their replacements. `mutation`: a file, a text that it has once, and
    another.
    """
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"), dirs_exist_ok=True)
    _change(sources, CPU | (changes or {}), mutation)
    # Most of the time goes to the compiler and the scheduler, so the kernels are optimized little.
    flags = [*FLAGS, "-Og", *(SANITIZE if sanitize else ())]
    name = "sanitized" if sanitize else "plain"
    headers = once(shared / f"{name}.h.gch", lambda target: _precompile(target, flags)).with_suffix("")
    of_scheduler = [*FLAGS, "-O2", *(["-DSHIM_SANITIZED"] if sanitize else ())]
    scheduler = once(shared / f"{name}.o", lambda target: _compile(SHIM / "shim.cpp", target, *of_scheduler))
    objects = [folder / f"{op}.o" for op in ops]
    for op, target in zip(ops, objects, strict=True):
        _compile(sources / "cuda" / f"{op}.cu", target, *flags, "-include", headers)
    library = folder / "shim.so"
    torch_libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
    # our stream and device guard, not those of a torch that knows no CUDA
    link = ["-shared", "-Wl,-Bsymbolic", *flags, *torch_libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(_compiler(), *objects, scheduler, "-o", library, *link)
    return library


def _change(sources: Path, changes: dict[str, str], mutation: Mutation | None) -> None:
    texts = {path: path.read_text() for path in sources.rglob("*") if path.is_file()}
    for before, after in changes.items():
        assert any(before in text for text in texts.values()), f"no source has {before!r}"
        texts = {path: text.replace(before, after) for path, text in texts.items()}
    for path, text in texts.items():
        if mutation and path.name == mutation[0]:
            assert text.count(mutation[1]) == 1, f"{path.name} has {mutation[1]!r} {text.count(mutation[1])}x"
            text = text.replace(mutation[1], mutation[2])
        path.write_text(text)


def _precompile(target: Path, flags: list[str]) -> None:
    """Compile the headers of torch, of C++ and of the shim that the sources include."""
    files = [p for d in ("csrc", "csrc/cuda") for p in sorted((ROOT / d).glob("*.*h"))]
    included = [line for p in files for line in re.findall(r"^#include <.+>$", p.read_text(), re.MULTILINE)]
    header = target.with_suffix("")
    header.write_text("\n".join(dict.fromkeys(included)) + "\n")
    _compile(header, target, *flags, language="c++-header")


def _compile(source: Path, target: Path, *flags: object, language: str = "c++") -> None:
    includes = [f"-I{SHIM}", *(f"-isystem{p}" for p in cpp_extension.include_paths())]
    _run(_compiler(), "-x", language, "-c", source, "-o", target, *flags, *includes)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def preload() -> str:
    """The sanitizers' runtimes, which have to come before everything else in a process."""
    names = [_run(_compiler(), f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
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
