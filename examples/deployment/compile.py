"""Compile run.cpp against the torch of this Python, by one call of the C++ compiler (CXX, or c++)."""

import argparse
import os
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("run.cpp")


def compile_program(output: Path) -> None:
    """Compile. Raise CalledProcessError if the compiler fails; it prints why."""
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    link = [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run(
        [*compiler, "-O2", "-std=c++20", *includes, str(SOURCE), *link, "-o", str(output)], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    compile_program(parser.parse_args().output)


if __name__ == "__main__":
    main()
