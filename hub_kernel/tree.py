"""Write the tree that kernel-builder compiles: build.toml, csrc/ and torch-ext/.

    torch-ext/rana_kernels/   the files of rana_kernels/ops with relative imports, and layers
    csrc/                     the kernels' sources, which register the ops in the namespace of the build

kernel-builder links one library for each device. That of the CPU therefore holds the ops once for every
instruction set, and `torch-ext/cpu_ops.h` chooses among them when the library is loaded.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from rana_kernels.ops import SCHEMAS
from setup import INSTRUCTION_SETS

ROOT = Path(__file__).parent.parent
SHIPPED = Path(__file__).parent / "shipped"
NAME, REPOSITORY = "rana_kernels", "rana-kernels"  # of the Python package, and as the Hub writes it
VERSION = 0  # of the functions and layers; 0 promises nothing about the next one
BASELINE = "baseline"  # of every processor, x86 or not
SETS = tuple(INSTRUCTION_SETS["x86_64"])
# What a set needs beyond the processor's flags. Linux may refuse matrix tiles (AMX).
ALSO_NEEDED = {"amx": "syscall(SYS_arch_prctl, 0x1023, 18) == 0"}
REGISTRATION = re.compile(r"^STABLE_TORCH_LIBRARY_IMPL\(rana, (\w+), m\)(.*)\n", re.MULTILINE)
OWN_REGISTRATION = r"STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, \1, m)\2" + "\n"


def write_tree(folder: Path, sets: Iterable[str] = SETS) -> Path:
    """Write the tree into `folder` and return it. An older tree there is replaced, but for files of others.

    sets   the instruction sets of x86-64 that get CPU ops of their own, beside the baseline

    Raises ValueError for a folder that holds something else.
    """
    toml = folder / "build.toml"
    ours = toml.is_file() and f'name = "{REPOSITORY}"' in toml.read_text()
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} holds something other than this kernel repository: name a new folder")
    for part in ("build", "csrc", "torch-ext"):
        shutil.rmtree(folder / part, ignore_errors=True)
    # from the least to the best
    sets = [name for name in SETS if name == BASELINE or name in sets]
    _write_python(folder / "torch-ext" / NAME)
    _write_sources(folder / "csrc")
    for name in sets:
        (folder / "csrc" / "cpu" / f"for_{name}.cpp").write_text(ops_for(name))
    (folder / "torch-ext" / "cpu_ops.h").write_text(choice_of_ops(sets))
    shutil.copy(SHIPPED / "torch_binding.cpp", folder / "torch-ext")
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(SHIPPED / name, folder)
    toml.write_text(_build_toml(folder, sets))
    return folder


def _write_python(package: Path) -> None:
    package.mkdir(parents=True)
    for name in ("__init__.py", "layers.py"):
        shutil.copy(SHIPPED / name, package)
    for path in sorted((ROOT / NAME / "ops").glob("*.py")):
        if path.stem != "_ops":  # the builder writes this one
            target = "functions.py" if path.stem == "__init__" else path.name
            (package / target).write_text(shipped_python(path.read_text()))


def shipped_python(text: str) -> str:
    """Return a file of rana_kernels/ops with relative imports, and with hints that Python 3.9 takes."""
    text = re.sub(r"^from rana_kernels\.ops import", "from . import", text, flags=re.MULTILINE)
    text = re.sub(r"^from rana_kernels\.ops\.", "from .", text, flags=re.MULTILINE)
    return re.sub(r'\A(""".*?"""\n)', r"\1\nfrom __future__ import annotations\n", text, flags=re.DOTALL)


def _write_sources(csrc: Path) -> None:
    """Copy csrc without the steps of generation. The CPU ops become headers, without registrations."""
    others = shutil.ignore_patterns(
        "bindings.cpp", "still_held.cpp", "between.h", "attention.h", "run_blocks.h"
    )
    shutil.copytree(ROOT / "csrc", csrc, ignore=others)
    for path in (csrc / "cuda").glob("*.cu"):
        path.write_text(REGISTRATION.sub(OWN_REGISTRATION, path.read_text()))
    for path in (csrc / "cpu").glob("*.cpp"):
        text = path.read_text().replace('#include "run_blocks.h"\n', "")
        text = REGISTRATION.sub("", text).replace('.cpp"\n', '.h"\n')
        path.with_suffix(".h").write_text("#pragma once\n" + text)
        path.unlink()


def ops_for(name: str) -> str:
    """Return the C++ file that compiles the CPU ops for an instruction set.

    A pragma names the set, because kernel-builder compiles the file for Arm as well. GCC before 13 does not
    define the set's macros then.
    """
    boxed = "".join(f"    TORCH_BOX(&{op}),\n" for op in SCHEMAS)
    ops = '#include "all_ops.h"\n#include "../../torch-ext/cpu_ops.h"\n\n'
    ops += f"extern const CpuOps {name}_ops = {{\n{boxed}}};\n"
    if features := _features(name):
        macros = ["__AVX__", *(f"__{feature.upper().replace('-', '_')}__" for feature in features)]
        defined = "".join(f"#ifndef {macro}\n#define {macro} 1\n#endif\n" for macro in macros)
        ops = f'#ifdef __x86_64__\n#pragma GCC target("{",".join(features)}")\n{defined}{ops}#endif\n'
    return f"// The CPU ops for {name}. Written by hub_kernel.\n{ops}"


def choice_of_ops(sets: list[str]) -> str:
    """Return the C++ header that knows the ops of every instruction set, and chooses the processor's."""
    better = [name for name in sets if name != BASELINE]
    members = "".join(f"  void (*{op})(StableIValue*, uint64_t, uint64_t);\n" for op in SCHEMAS)
    known = "".join(f"extern const CpuOps {name}_ops;\n" for name in better)
    tests = "".join(f"  if ({_runs(name)}) return {name}_ops;\n" for name in reversed(better))
    calls = "".join(f'  library.impl("{op}", ops.{op});\n' for op in SCHEMAS)
    return f"""// The CPU ops as torch calls them. Written by hub_kernel.
#pragma once

#include <sys/syscall.h>
#include <torch/csrc/stable/library.h>
#include <unistd.h>

struct CpuOps {{
{members}}};

extern const CpuOps {BASELINE}_ops;
#ifdef __x86_64__
{known}#endif

inline const CpuOps& best_ops() {{
#ifdef __x86_64__
{tests}#endif
  return {BASELINE}_ops;
}}

inline void register_ops(torch::stable::detail::StableLibrary& library, const CpuOps& ops) {{
{calls}}}
"""


def _runs(name: str) -> str:
    """Return the C++ expression that says whether the processor has an instruction set."""
    tests = [f'__builtin_cpu_supports("{feature}")' for feature in _features(name)]
    return " && ".join([*tests, *([ALSO_NEEDED[name]] if name in ALSO_NEEDED else [])])


def _features(name: str) -> list[str]:
    return [flag.removeprefix("-m") for flag in INSTRUCTION_SETS["x86_64"][name]]


def _build_toml(folder: Path, sets: list[str]) -> str:
    """Return build.toml with the files of each device.

    The linker keeps the first of several functions of the same name, such as those of std::vector. The files
    come in the order of the sets, so no file gets code for a better set than its own.
    """
    sources = {
        "cpu": [f"csrc/cpu/for_{name}.cpp" for name in sets],
        "cuda": sorted(str(path.relative_to(folder)) for path in (folder / "csrc" / "cuda").glob("*.cu")),
    }
    text = (SHIPPED / "build.toml").read_text().replace("@version@", str(VERSION))
    for device, files in sources.items():
        headers = [*(folder / "csrc").glob("*.h"), *(folder / "csrc" / device).glob("*.*h")]
        files += sorted(str(path.relative_to(folder)) for path in headers)
        text = text.replace(f"@{device}_sources@", json.dumps(files, indent=4))
    return text
