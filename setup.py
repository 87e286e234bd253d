"""What to compile: the CPU op libraries, one for each instruction set, the CUDA one, the ops' schemas for
programs without Python, and the host module.

The op libraries use torch's stable ABI, so one build serves every later torch and Python. Without a
compiler, or without torch at build time, the package installs as pure Python: every op then runs on
the plain PyTorch reference. The CUDA library is compiled wherever nvcc is found: it needs neither a card
nor a torch with CUDA. RANA_BUILD=auto (the default) compiles what can be compiled; cpu or cuda insist on
the CPU libraries, or on all of them; wheel insists on the CPU libraries, and leaves out the host module, so
that one wheel serves every Python; none asks for pure Python.
"""

import ast
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020A000000000000"  # torch 2.10
LIMITED_API = "cp310"  # the oldest Python of a wheel
COMPILE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
# false alarms inside the compiler's own vector headers
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
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
# Code for these cards, all of it made of PTX for the first one: no kernel asks which card it is compiled for.
# Drivers make code for later cards of the same PTX.
CUDA_TARGETS = ("80", "90", "100")
CUDA_LINK = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "--cudart=static"]
CUDA_COMPILE = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]

# what lets the libraries of a wheel load with this glibc, which manylinux_2_28 has
GLIBC, GLIBC_CPP = "2.28", "csrc/glibc.cpp"

# the list of ops, and the file made of it
SCHEMAS_PY, SCHEMAS_CPP = "rana_kernels/ops/schemas.py", "build/schemas.cpp"


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if platform.machine() not in INSTRUCTION_SETS:
        return f"there are no kernels for {platform.machine()}"
    compiler = cxx()[0]
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
    found = {}
    for name, flags in INSTRUCTION_SETS[platform.machine()].items():
        nothing = [*cxx(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(nothing, capture_output=True).returncode == 0:
            found[name] = flags
        else:
            say(f"no kernels for {name}: {cxx()[0]} does not know {' '.join(flags)}")
    return found


def op_libraries() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    return [
        CppExtension(
            f"rana_kernels._cpu_{name}",
            ["csrc/cpu/all_ops.cpp", GLIBC_CPP],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=[*COMPILE, *QUIET, *flags],
            py_limited_api=True,
        )
        for name, flags in instruction_sets().items()
    ]


def schemas_library() -> Extension:
    """The schemas alone, for C++ programs, which lack `ops/schemas.py`. Python never loads it."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "rana_kernels._schemas",
        [SCHEMAS_CPP],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=COMPILE,
        py_limited_api=True,
    )


def held_module() -> Extension:
    """The module that a step of generation asks whether the model is as it was."""
    return Extension(
        "rana_kernels._held", ["csrc/still_held.cpp"], extra_compile_args=COMPILE, py_limited_api=True
    )


def write_schemas() -> None:
    """Write `SCHEMAS` as C++. The file is read as text: an import would load the package being built."""
    assigned = [node for node in ast.parse(Path(SCHEMAS_PY).read_text()).body if isinstance(node, ast.Assign)]
    table = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "SCHEMAS")
    lines = [f"  m.def({json.dumps(name + schema)});" for name, schema in ast.literal_eval(table).items()]
    Path(SCHEMAS_CPP).parent.mkdir(exist_ok=True)
    Path(SCHEMAS_CPP).write_text(
        f"// Written by setup.py from {SCHEMAS_PY}.\n#include <torch/csrc/stable/library.h>\n\n"
        + "\n".join(["STABLE_TORCH_LIBRARY(rana, m) {", *lines, "}\n"])
    )


def cuda_sources() -> list[str]:
    return [*sorted(str(p) for p in Path("csrc/cuda").glob("*.cu")), GLIBC_CPP]


def cuda_library() -> Extension:
    return Extension("rana_kernels._cuda", cuda_sources(), py_limited_api=True)


def cuda_targets() -> list[str]:
    """Those that this nvcc knows: 10.0 is new in CUDA 12.8."""
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    return [target for target in CUDA_TARGETS if f"compute_{target}" in listed.split()]


def cuda_compile_command() -> list[str]:
    """The command that compiles one file for every card. Its targets share the cores that are left."""
    from torch.utils import cpp_extension

    targets = cuda_targets()
    codes = ",".join([*(f"sm_{t}" for t in targets), f"compute_{targets[0]}"])
    gencode = f"-gencode=arch=compute_{targets[0]},code=[{codes}]"
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    includes = [word for p in cpp_extension.include_paths() for word in ("-isystem", p)]
    threads = f"--threads={max(1, jobs() // len(cuda_sources()))}"
    return [str(nvcc()), *CUDA_COMPILE, gencode, threads, *defines, *includes]


def cuda_link_command(objects: list[str]) -> list[str]:
    """The command that links the objects, libtorch always: symbols that only CUDA builds have are weak."""
    from torch.utils import cpp_extension

    paths = [f"-L{p}" for p in cpp_extension.library_paths()]
    if os.environ.get("RANA_BUILD") == "wheel" and find_spec("ziglang"):
        torch_libraries = [*paths, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        return zig_link_command(objects, torch_libraries)
    return [str(nvcc()), *objects, "-shared", *CUDA_COMPILE, *paths, *CUDA_LINK]


def zig_link_command(objects: list[str], libraries: list[str]) -> list[str]:
    """The command that links CUDA's runtime for an old glibc, whose functions zig knows.

    The runtime calls functions of threads, and this machine's glibc gives them its own version. The
    compiler's libraries come before zig's, so that exceptions have one unwinder.
    """
    plan = subprocess.run([nvcc(), "--dryrun", "-shared", "any.o"], capture_output=True, text=True).stderr
    runtime = shlex.split(next(line for line in plan.splitlines() if "LIBRARIES=" in line).split("=", 1)[1])
    of_compiler = [
        subprocess.run([*cxx(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libstdc++.so.6", "libgcc_s.so.1")
    ]
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    linker = [sys.executable, "-m", "ziglang", "cc", "-shared", "-target", target]
    of_system = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-lm"]
    return [*linker, *objects, *libraries, *runtime, *of_compiler, *of_system]


def compile_command(ext: Extension) -> list[str]:
    """The command that compiles one file of a library of C++."""
    macros = [f"-D{name}={value}" for name, value in ext.define_macros]
    includes = [f"-I{p}" for p in (*ext.include_dirs, sysconfig.get_paths()["include"])]
    given = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*cxx(), "-fPIC", "-pthread", "-DNDEBUG", *ext.extra_compile_args, *macros, *includes, *given]


def link_command(ext: Extension, objects: list[str]) -> list[str]:
    """The command that links the objects of a library of C++."""
    libraries = [f"-L{p}" for p in ext.library_dirs] + [f"-l{name}" for name in ext.libraries]
    given = shlex.split(os.environ.get("LDFLAGS", ""))
    return [
        *cxx(),
        *objects,
        "-shared",
        "-pthread",
        *ext.extra_link_args,
        *given,
        "-Wl,--as-needed",
        *libraries,
    ]


def cxx() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def jobs() -> int:
    """How many compilers run at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


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


@dataclass
class Step:
    """One command of the build. It reads `inputs`, writes `output`, and says `title`."""

    title: str
    command: list[str]
    inputs: list[str]
    output: str


def steps_of(ext: Extension, folder: Path, target: str) -> list[Step]:
    """The steps that compile and link one library. Large files come first: small ones then fill the gaps."""
    name, cuda = ext.name.split(".")[-1], ext.sources == cuda_sources()
    compile_ = cuda_compile_command() if cuda else compile_command(ext)
    steps = []
    for source in sorted(ext.sources, key=os.path.getsize, reverse=True):
        output = str(folder / ext.name / f"{Path(source).name}.o")
        command = [*compile_, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]
        steps.append(Step(f"{name}: {Path(source).name}", command, [source], output))
    objects = [step.output for step in steps]
    link = cuda_link_command(objects) if cuda else link_command(ext, objects)
    steps.append(Step(f"{name}: link", [*link, "-o", target], objects, target))
    return steps


def ninja() -> str | None:
    """Return ninja from the path, else from the environment of this Python, else None."""
    return shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)


def run_with_ninja(program: str, steps: list[Step], folder: Path) -> None:
    """Run what is out of date, side by side. Ninja knows the headers from the compilers' dependency files."""

    def word(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"builddir = {word(str(folder))}",
        "rule compile",
        "  command = $call",
        "  description = $title",
        "  depfile = $depfile",
        "  deps = gcc",
    ]
    lines += ["rule link", "  command = $call", "  description = $title"]
    for step in steps:
        rule = "compile" if "-c" in step.command else "link"
        lines.append(f"build {word(step.output)}: {rule} {' '.join(map(word, step.inputs))}")
        call = shlex.join(step.command).replace("$", "$$")
        lines += [f"  call = {call}", f"  title = {step.title}", f"  depfile = {step.output}.d"]
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    environment = {**os.environ, "NINJA_STATUS": "rana_kernels [%f/%t, %e s] "}
    command = [program, "-f", str(folder / "build.ninja"), "-j", str(jobs())]
    subprocess.run(command, check=True, env=environment)


def run_in_order(steps: list[Step]) -> None:
    """Run every step, one after the other, where there is no ninja."""
    for step in steps:
        say(step.title)
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(step.command, check=True)


def build_command() -> dict:
    from setuptools.command.build_ext import build_ext
    from setuptools.modified import newer_group

    class Build(build_ext):
        """Compile the files of all libraries side by side, so that no core is idle while a library ends."""

        def build_extensions(self) -> None:
            if newer_group([SCHEMAS_PY, "setup.py"], SCHEMAS_CPP):
                write_schemas()
            folder, steps = Path(self.build_temp), []
            for ext in self.extensions:
                steps += steps_of(ext, folder, self.get_ext_fullpath(ext.name))
            if program := ninja():
                run_with_ninja(program, steps, folder)
            else:
                run_in_order(steps)

    return {"build_ext": Build}


def say(line: str) -> None:
    print(f"rana_kernels: {line}", file=sys.stderr)


def compiled() -> dict:
    """The arguments of setup() that have to do with compiling."""
    wanted = os.environ.get("RANA_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "wheel", "none"):
        sys.exit(f"RANA_BUILD is {wanted!r}, wanted auto, cpu, cuda, wheel or none")
    obstacle = "RANA_BUILD=none" if wanted == "none" else why_not()
    if obstacle is not None:
        if wanted in ("cpu", "cuda", "wheel"):
            sys.exit(f"rana_kernels: RANA_BUILD={wanted}, but {obstacle}")
        say(f"installing without compiled kernels, because {obstacle}; every op will run on plain PyTorch")
        return {}
    if wanted == "cuda" and nvcc() is None:
        sys.exit("rana_kernels: RANA_BUILD=cuda, but nvcc was not found (on the path, or in CUDA_HOME)")
    cuda = [cuda_library()] if wanted != "cpu" and nvcc() else []
    say(f"compiling the CPU kernels{' and, with ' + str(nvcc()) + ', the CUDA kernels' if cuda else ''}")
    stable = [*cuda, *op_libraries(), schemas_library(), held_module()]
    if wanted == "wheel":
        options = {"bdist_wheel": {"py_limited_api": LIMITED_API}}
        return {"ext_modules": stable, "cmdclass": build_command(), "options": options}
    return {"ext_modules": [*stable, *host_module()], "cmdclass": build_command()}


if __name__ == "__main__":
    setup(**compiled())
