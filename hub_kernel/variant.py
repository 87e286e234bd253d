"""Compile the CPU variant of a tree for this machine, as kernel-builder does: build/<variant>/."""

import base64
import hashlib
import json
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import CppExtension

import setup
from hub_kernel.tree import NAME, REPOSITORY, SETS, SHIPPED, VERSION

OPS_PY = '''"""The namespace of this build."""

import torch

from . import {id}

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''
PYTHON_ABI = "0x03090000"  # Python 3.9, the oldest that a kernel has to serve


def build_variant(tree: Path) -> Path:
    """Compile the CPU variant of `tree`, and return its folder. One library serves every torch from 2.10."""
    torch_version = int(setup.STABLE_ABI, 16)
    abi = f"{torch_version >> 56}{torch_version >> 48 & 0xFF}"
    folder = tree / "build" / f"torch-stable-abi{abi}-cpu-{platform.machine()}-linux"
    identifier = f"_{NAME}_cpu_{fingerprint(tree)}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tree / "torch-ext" / NAME, folder)
    compile_library(tree, identifier, folder / f"{identifier}.abi3.so")
    complete(folder, identifier)
    return folder


def fingerprint(tree: Path) -> str:
    """Return a name for the contents of the tree. A build of other sources thus has another namespace."""
    digest = hashlib.sha256()
    for path in sorted(p for part in ("csrc", "torch-ext") for p in (tree / part).rglob("*.*")):
        digest.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def compile_library(tree: Path, identifier: str, target: Path) -> None:
    """Compile the CPU ops of the tree into the Python module `identifier`."""
    macros = {"TORCH_TARGET_VERSION": setup.STABLE_ABI, "TORCH_EXTENSION_NAME": identifier}
    macros |= {"CPU_KERNEL": "1", "Py_LIMITED_API": PYTHON_ABI}
    flags = [*setup.COMPILE, *setup.QUIET]
    library = CppExtension(identifier, [], define_macros=[*macros.items()], extra_compile_args=flags)
    compiler = setup.compile_command(library)
    written = [tree / "csrc" / "cpu" / f"for_{name}.cpp" for name in SETS]
    sources = [
        tree / "torch-ext" / "torch_binding.cpp",
        tree / setup.GLIBC_CPP,
        *filter(Path.exists, written),
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(setup.jobs()) as pool:
        objects = [f"{folder}/{source.stem}.o" for source in sources]

        def compile_one(source: Path, output: str) -> None:
            subprocess.run([*compiler, "-c", source, "-o", output], check=True)

        list(pool.map(compile_one, sources, objects))
        subprocess.run([*setup.link_command(library, objects), "-o", target], check=True)


def complete(folder: Path, identifier: str) -> None:
    """Write what kernel-builder adds to the Python files and the library of a variant."""
    (folder / "_ops.py").write_text(OPS_PY.format(id=identifier))
    (folder / NAME).mkdir()
    shutil.copy(SHIPPED / "compat.py", folder / NAME / "__init__.py")
    (folder / "metadata.json").write_text(json.dumps(metadata(folder, identifier), indent=2) + "\n")


def metadata(folder: Path, identifier: str) -> dict:
    """Return what the kernels library and the Hub read about a variant, with digests of its files."""
    files = {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".so")
    }
    return {
        "name": REPOSITORY,
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": files},
    }
