"""What to compile: the op libraries, one for each instruction set, and the small host module.

The op libraries use torch's stable ABI, so one build serves every later torch and Python. Without a
compiler, or without torch at build time, the package installs as pure Python: every op then runs on
the plain PyTorch reference. RANA_BUILD=none asks for that; RANA_BUILD=cpu makes its absence an error.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020A000000000000"  # torch 2.10
COMPILE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
QUIET = ["-Wno-maybe-uninitialized"]  # false alarms inside the compiler's own vector headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    },
    "aarch64": {"baseline": []},
}


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
        for name, flags in INSTRUCTION_SETS[platform.machine()].items()
    ]


def host_module() -> list[Extension]:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say("pybind11 was not found: `rana info` will not show how the libraries were built")
        return []
    import torch

    facts = {"RANA_TORCH": torch.__version__, "RANA_SETS": ",".join(INSTRUCTION_SETS[platform.machine()])}
    macros = [(key, f'"{value}"') for key, value in facts.items()]
    return [Pybind11Extension("rana_kernels._C", ["csrc/bindings.cpp"], define_macros=macros, cxx_std=17)]


def build_command() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
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
    if wanted not in ("auto", "cpu", "none"):
        sys.exit(f"RANA_BUILD is {wanted!r}, wanted auto, cpu or none")
    obstacle = "RANA_BUILD=none" if wanted == "none" else why_not()
    if obstacle is None:
        return {"ext_modules": [*op_libraries(), *host_module()], "cmdclass": build_command()}
    if wanted == "cpu":
        sys.exit(f"rana_kernels: RANA_BUILD=cpu, but {obstacle}")
    say(f"installing without compiled kernels, because {obstacle}; every op will run on plain PyTorch")
    return {}


setup(**compiled())
