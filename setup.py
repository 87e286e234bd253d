"""What to compile: the CPU op libraries, one for each instruction set, the CUDA one, the ops' schemas for
programs without Python, and the host module.

The op libraries use torch's stable ABI, so one build serves every later torch and Python. Without a
compiler, or without torch at build time, the package installs as pure Python: every op then runs on
the plain PyTorch reference. The CUDA library is compiled wherever nvcc is found: it needs neither a card
nor a torch with CUDA. RANA_BUILD=auto (the default) compiles what can be compiled; cpu or cuda insist on
the CPU libraries, or on all of them; none asks for pure Python.
"""

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020A000000000000"  # torch 2.10
COMPILE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
# false alarms inside the compiler's own vector headers
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"baseline": []},
}
# code for these cards, and PTX from which a driver compiles for later ones
CUDA_TARGETS = ("80", "90", "100")
CUDA_COMPILE = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]

# the list of ops, and the file made of it
OPS, SCHEMAS = "rana_kernels/ops/schemas.py", "build/schemas.cpp"


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if platform.machine() not in INSTRUCTION_SETS:
        return f"there are no kernels for {platform.machine()}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}) was found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable in the build (use --no-build-isolation)"
    return None


def nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME if that is set, else the one on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


@cache
def instruction_sets() -> dict[str, list[str]]:
    """Those of this machine that its compiler knows: AMX is new in GCC 11."""
    compiler = os.environ.get("CXX", "c++").split()
    found = {}
    for name, flags in INSTRUCTION_SETS[platform.machine()].items():
        nothing = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(nothing, capture_output=True).returncode == 0:
            found[name] = flags
        else:
            say(f"no kernels for {name}: {compiler[0]} does not know {' '.join(flags)}")
    return found


def op_libraries() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
    headers = sorted(str(p) for p in Path("csrc").rglob("*.h"))
    return [
        CppExtension(
            f"rana_kernels._cpu_{name}",
            sources,
            depends=headers,
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=[*COMPILE, *QUIET, *flags],
            py_limited_api=True,
        )
        for name, flags in instruction_sets().items()
    ]


def schemas_library() -> Extension:
    """The schemas alone: for C++ programs, which lack `rana_kernels/ops/schemas.py`. Python never loads it."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "rana_kernels._schemas",
        [SCHEMAS],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=COMPILE,
        py_limited_api=True,
    )


def write_schemas() -> None:
    """`SCHEMAS` of ops/schemas.py as C++. The file is read, not imported: it would load the package being built."""
    assigned = [node for node in ast.parse(Path(OPS).read_text()).body if isinstance(node, ast.Assign)]
    table = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "SCHEMAS")
    lines = [f"  m.def({json.dumps(name + schema)});" for name, schema in ast.literal_eval(table).items()]
    Path(SCHEMAS).parent.mkdir(exist_ok=True)
    Path(SCHEMAS).write_text(
        f"// Written by setup.py from {OPS}.\n#include <torch/csrc/stable/library.h>\n\n"
        + "\n".join(["STABLE_TORCH_LIBRARY(rana, m) {", *lines, "}\n"])
    )


def cuda_sources() -> list[str]:
    return sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))


def cuda_library() -> Extension:
    """Its sources are dependencies: torch's BuildExtension refuses .cu sources where torch has no CUDA."""
    headers = sorted(str(p) for d in ("csrc", "csrc/cuda") for p in Path(d).glob("*.*h"))
    return Extension(
        "rana_kernels._cuda", sources=[], depends=[*cuda_sources(), *headers], py_limited_api=True
    )


def cuda_targets() -> list[str]:
    """Those that this nvcc knows: 10.0 is new in CUDA 12.8."""
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    return [target for target in CUDA_TARGETS if f"compute_{target}" in listed.split()]


def compile_cuda(target: str) -> None:
    """One call of nvcc. libtorch is linked even if not needed: what only CUDA torches have is weak."""
    from torch.utils import cpp_extension

    Path(target).parent.mkdir(parents=True, exist_ok=True)
    targets = cuda_targets()
    gencode = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    newest = targets[-1]
    gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    includes = [word for p in cpp_extension.include_paths() for word in ("-isystem", p)]
    link = [f"-L{p}" for p in cpp_extension.library_paths()]
    link += ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "--cudart=static"]
    # one thread a target and file at most, as many as MAX_JOBS allows
    threads = [f"--threads={os.environ.get('MAX_JOBS', '0')}"]
    subprocess.run(
        [nvcc(), "-shared", *CUDA_COMPILE, *gencode, *threads, *defines, *includes, *cuda_sources()]
        + [*link, "-o", target],
        check=True,
    )


def host_module() -> list[Extension]:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say("pybind11 was not found: `rana info` will not show how the libraries were built")
        return []
    import torch

    facts = {"RANA_TORCH": torch.__version__, "RANA_SETS": ",".join(instruction_sets())}
    macros = [(key, f'"{value}"') for key, value in facts.items()]
    return [Pybind11Extension("rana_kernels._C", ["csrc/bindings.cpp"], define_macros=macros, cxx_std=17)]


def build_command() -> dict:
    from setuptools.modified import newer_group
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            if ext.name == "rana_kernels._cuda":
                target = self.get_ext_fullpath(ext.name)
                if self.force or newer_group(ext.depends, target, "newer"):
                    compile_cuda(target)
                return
            if ext.sources == [SCHEMAS] and newer_group([OPS, "setup.py"], SCHEMAS):
                write_schemas()
            # the libraries share their sources: each needs an object folder of its own
            shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    return {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


def say(line: str) -> None:
    print(f"rana_kernels: {line}", file=sys.stderr)


def compiled() -> dict:
    """The arguments of setup() that have to do with compiling."""
    wanted = os.environ.get("RANA_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"RANA_BUILD is {wanted!r}, wanted auto, cpu, cuda or none")
    obstacle = "RANA_BUILD=none" if wanted == "none" else why_not()
    if obstacle is not None:
        if wanted in ("cpu", "cuda"):
            sys.exit(f"rana_kernels: RANA_BUILD={wanted}, but {obstacle}")
        say(f"installing without compiled kernels, because {obstacle}; every op will run on plain PyTorch")
        return {}
    if wanted == "cuda" and nvcc() is None:
        sys.exit("rana_kernels: RANA_BUILD=cuda, but nvcc was not found (on the path, or in CUDA_HOME)")
    cuda = [cuda_library()] if wanted != "cpu" and nvcc() else []
    say(f"compiling the CPU kernels{' and, with ' + str(nvcc()) + ', the CUDA kernels' if cuda else ''}")
    return {
        "ext_modules": [*op_libraries(), *cuda, schemas_library(), *host_module()],
        "cmdclass": build_command(),
    }


setup(**compiled())
